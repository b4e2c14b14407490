"""Fitting: what is left of a document that is longer than may be read, and the chunks it is divided into.

Texts are cut, not tokens: what is left goes the way of any other pair, through the model's own prompt, template and
truncation. Where to cut is known from the tokenizer, which tells where in a text each token is.
"""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mp_rerank._pairs import Pair, PairOptions, Readings

__all__ = ["Fitted", "Fitter", "Piece", "chunks", "fit_all", "place_before", "without_tails"]

# A text is cut before it is tokenized with another where it has more than so many tokens for each that can be read, and
# looked at only if it has so many characters for each.
TAIL_FACTOR = 2
TAIL_CHARACTERS = 40
# Of the tokens beside the query: a chunk shares the one part with the next, and ends in the last of the other parts. To
# begin with a sentence, it may share as much as that.
OVERLAP_PART = 8
ENDING_PART = 4
# A query so long that it leaves less than this part to the document is itself cut by the model's truncation.
LEAST_PART = 4

SENTENCE_END = re.compile(r"[.!?…]+[\"')\]»”’]*\s+|[。！？]+[」』”]*|\n\s*")


class Piece(NamedTuple):
    """What is scored of a pair.

    Attributes:
        pair: the query, and the part of the document.
        passage: where in the document that part is: its start and end, in characters.
        cut: whether something of the document is in no piece of it.
    """

    pair: Pair
    passage: tuple[int, int]
    cut: bool


class TooLongError(Exception):
    """A document is longer than may be read, and is not to be cut.

    Attributes:
        tokens: how many it has.
        limit: how many are allowed.
    """

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(tokens, limit)
        self.tokens = tokens
        self.limit = limit


class Fitter:
    """Fits the documents of one slice.

    Args:
        tokenizer: a fast one.
        max_length: tokens that the model truncates a pair to; ``None``: it reads any.
        count: the tokens of a pair with a prompt, before truncation.
    """

    def __init__(self, tokenizer: Any, max_length: int | None, count: Callable[[Pair, str | None], int]) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._count = count
        self._overheads: dict[tuple[str, str | None], int] = {}  # most pairs of a slice have one query

    def fit(self, pair: Pair, options: PairOptions) -> list[Piece]:
        """What is scored of ``pair``: one piece, or several in their order.

        Raises:
            TooLongError: the document is too long, and is not to be cut.
        """
        query, document = pair
        where = self._tokens(document)
        start, end = 0, len(document)
        cut = False
        limit = options.max_tokens_per_doc
        if limit is not None and len(where) > limit:
            start, end, where = self._shorten(document, where, limit, len(where), options)
            cut = True
        if self._max_length is not None:
            overhead = self._overhead(query, options.prompt)
            room = max(self._max_length - overhead, self._max_length // LEAST_PART)
            if len(where) > room:
                if options.long_documents == "chunk":
                    text = document[start:end]
                    found = self._chunks(text, [(a - start, b - start) for a, b in where], room)
                    return [Piece((query, text[a:b]), (start + a, start + b), cut) for a, b in found]
                if options.truncation != "end":  # what `predict` does
                    start, end, where = self._shorten(
                        document, where, room, overhead + len(where), options, self._max_length
                    )
                    cut = True
        return [Piece((query, document[start:end]), (start, end), cut)]

    def _chunks(self, text: str, where: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
        """``chunks`` that each have no more than ``room`` tokens alone, too: cut in a word, a text may have others."""
        most = room
        while True:
            found = chunks(text, where, most)
            excess = max(len(self._tokens(text[begin:end])) for begin, end in found) - room
            if excess <= 0 or most == 1:
                return found
            most = max(1, most - excess)

    def _shorten(
        self,
        document: str,
        where: list[tuple[int, int]],
        room: int,
        tokens: int,
        options: PairOptions,
        limit: int | None = None,
    ) -> tuple[int, int, list[tuple[int, int]]]:
        """The part of ``document`` that is left with ``room`` tokens, its start and end, and where its tokens are."""
        if options.truncation == "error":
            raise TooLongError(tokens, room if limit is None else limit)
        most = room
        while True:
            where = where[-most:] if options.truncation == "start" else where[:most]
            start, end = (where[0][0], len(document)) if options.truncation == "start" else (0, where[-1][1])
            excess = len(self._tokens(document[start:end])) - room  # cut in a word, a text may have other tokens
            if excess <= 0 or most == 1:
                return start, end, where
            most = max(1, most - excess)

    def _tokens(self, text: str) -> list[tuple[int, int]]:
        """Where in ``text`` each of its tokens is."""
        return token_places(self._tokenizer, text)

    def _overhead(self, query: str, prompt: str | None) -> int:
        """Tokens of a pair that are not its document's."""
        key = query, prompt
        if key not in self._overheads:
            self._overheads[key] = self._count((query, ""), prompt)
        return self._overheads[key]


@dataclass(frozen=True)
class Fitted:
    """The pieces of a slice's pairs.

    Attributes:
        pieces: each with the place of its pair in the slice.
        pairs: how many pairs the slice has.
        too_long: the pairs that have no piece: their tokens, and how many are allowed.
    """

    pieces: list[tuple[int, Piece]]
    pairs: int
    too_long: dict[int, tuple[int, int]]

    def fold(self, scores: Sequence[Any], tokens: Sequence[int], truncated: Sequence[bool]) -> tuple[Any, Readings]:
        """The scores and the readings of the pairs, made of those of their pieces: the best score counts."""
        best: dict[int, int] = {}
        count = Counter(place for place, _ in self.pieces)
        readings = Readings(array("i", bytes(4 * self.pairs)), bytearray(self.pairs), {}, self.too_long)
        for i, (place, piece) in enumerate(self.pieces):
            readings.tokens[place] += tokens[i]
            readings.truncated[place] |= piece.cut or truncated[i]
            if place not in best or scores[i] > scores[best[place]] or np.isnan(scores[i]):  # nan stays, to be seen
                best[place] = i
        for place, i in best.items():
            if count[place] > 1:
                readings.passages[place] = self.pieces[i][1].passage
        missing = np.full_like(np.asarray(scores[0]), np.nan) if len(scores) else np.nan
        return [scores[best[place]] if place in best else missing for place in range(self.pairs)], readings


def fit_all(fitter: Fitter, pairs: Sequence[Pair], options: Sequence[PairOptions]) -> Fitted:
    """The pieces of ``pairs``."""
    pieces: list[tuple[int, Piece]] = []
    too_long = {}
    for place, (pair, how) in enumerate(zip(pairs, options, strict=True)):
        try:
            pieces += [(place, piece) for piece in fitter.fit(pair, how)]
        except TooLongError as error:
            too_long[place] = error.tokens, error.limit
    return Fitted(pieces, len(pairs), too_long)


def token_places(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where in ``text`` each of its tokens is, without special ones."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    places: list[tuple[int, int]] = encoding["offset_mapping"]
    return places


def without_tails(tokenizer: Any, pairs: list[Pair], max_length: int | None) -> list[Pair]:
    """``pairs`` without what a pair of ``max_length`` tokens can hold nothing of.

    Truncation within a pair keeps every part that it cuts off, and pairs those of the query with those of the document:
    20,000 words of each take gigabytes. Cut alone, a text takes no more than its own tokens.
    """
    if max_length is None or not getattr(tokenizer, "is_fast", False):
        return pairs
    most = TAIL_CHARACTERS * max_length
    if all(len(query) <= most and len(document) <= most for query, document in pairs):
        return pairs
    places: dict[str, list[tuple[int, int]]] = {}

    def cut(text: str, other: str) -> str:
        """The beginning of ``text``, longer than that of ``other`` if it is the longer: truncation looks at that."""
        kept = TAIL_FACTOR * max_length + (len(places[text]) > len(places[other]))
        return text if len(places[text]) <= kept else text[: places[text][kept - 1][1]]

    found = []
    for pair in pairs:
        if max(map(len, pair)) > most:
            for text in pair:
                if text not in places:
                    places[text] = token_places(tokenizer, text)
            query, document = pair
            pair = cut(query, document), cut(document, query)
        found.append(pair)
    return found


def place_before(given: str, clean: str, place: tuple[int, int]) -> tuple[int, int]:
    """Where in ``given`` a ``place`` in ``clean`` is: the same text, its halves of characters put together."""
    if len(given) == len(clean):
        return place
    starts = []
    i = 0
    while i < len(given):
        starts.append(i)
        i += 2 if "\ud800" <= given[i] <= "\udbff" and "\udc00" <= given[i + 1 : i + 2] <= "\udfff" else 1
    starts.append(i)
    return starts[place[0]], starts[place[1]]


def chunks(text: str, places: list[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Divide ``text`` into parts of at most ``room`` tokens, each beginning a little before the last one's end.

    Args:
        places: where in the text each of its tokens is.

    Returns:
        Start and end of each part, in characters: at ends of sentences where there is one near, else between words.
    """
    starts = [start for start, _ in places]
    breaks = [match.end() for match in SENTENCE_END.finditer(text)]
    found = []
    first = 0
    while first + room < len(places):
        last = first + room
        begin = starts[first] if first else 0
        # The chunk's end: the last break within it, if that leaves most of it.
        least = max(begin + 1, starts[last - max(1, room // ENDING_PART)])
        end = _last_within(breaks, least, places[last - 1][1]) or _last_space(text, least, places[last - 1][1])
        found.append((begin, end))
        last = bisect_left(starts, end)
        # The next one's beginning: the nearest break before the overlap or in it, or else the overlap's first word.
        overlap = starts[max(first + 1, last - max(1, room // OVERLAP_PART))]
        most = starts[max(first + 1, last - max(1, room // ENDING_PART))]
        begin = _last_within(breaks, most, overlap) or _first_within(breaks, overlap, end - 1) or overlap
        first = max(first + 1, min(bisect_left(starts, begin), last))
    found.append((starts[first] if first else 0, len(text)))
    return found


def _last_within(breaks: list[int], least: int, most: int) -> int | None:
    """The last of ``breaks`` from ``least`` to ``most``."""
    place = bisect_left(breaks, most + 1) - 1
    return breaks[place] if place >= 0 and breaks[place] >= least else None


def _first_within(breaks: list[int], least: int, most: int) -> int | None:
    """The first of ``breaks`` from ``least`` to ``most``."""
    place = bisect_left(breaks, least)
    return breaks[place] if place < len(breaks) and breaks[place] <= most else None


def _last_space(text: str, least: int, most: int) -> int:
    """After the last space of ``text`` between ``least`` and ``most``; ``most`` where there is none."""
    for i in range(most, least, -1):
        if text[i - 1].isspace():
            return i
    return most
