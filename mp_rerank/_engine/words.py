"""The tokens of words that were seen before.

A tokenizer first cuts a text into words, and then each word into tokens, whatever stands around it. Texts are made of
the same words again and again. So a text is cut here, only where its tokenizer cuts it too; what a word's tokens are is
asked of the tokenizer, once. MiniLM-L6 in 16 bits is so fast that its tokenizer took 8 % of a worker's time.

A word that is new takes twice the time that it takes within its text. Where most words are new, as in texts of numbers
or of hashes, whole texts are given to the tokenizer for a while.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

__all__ = ["PairTokens", "WordTokenizer"]

#: words that are remembered, in about 10 MiB; once there are more, all are forgotten
MOST_WORDS = 1 << 15
#: characters of a word that is remembered
LONGEST_WORD = 32
#: Of so many words the share of new ones is looked at. If it is more than can be worth while, texts with so many times
#: as many words are then tokenized whole.
WORDS_OF_A_LOOK = 30_000
MOST_NEW = 0.4
LOOKS_WITHOUT = 8
# A text with so many first characters of an added token ("[CLS]") is tokenized whole: such tokens are no words. There
# may be a few such beginnings, since each is looked for in each text.
MARK = 4
MOST_MARKS = 32

# BERT's words end at white space, and each punctuation mark is one. Of white space, its normalizer leaves these four:
# other control characters vanish, and what stood on both sides of them is one word. What is not in ASCII stays within
# its word here, and is left to the tokenizer.
BERT_WORD = re.compile(r"[^ \t\n\r!-/:-@\[-`{-~]+|[!-/:-@\[-`{-~]")
# GPT-2's words, within ASCII: a space goes with the word after it (`ByteLevel` of the tokenizers library).
GPT2_WORD = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^A-Za-z0-9\t-\r ]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+", re.ASCII
)


@dataclass(frozen=True)
class _Cutter:
    """How texts are cut into words.

    Attributes:
        word: a pattern that finds a text's words.
        lower: whether letters in ASCII may be made small before.
        ascii_only: whether it knows the words of no other texts.
    """

    word: re.Pattern[str]
    lower: bool
    ascii_only: bool


class PairTokens(NamedTuple):
    """A pair as tokens.

    Attributes:
        ids: of its tokens, special ones included.
        types: of its tokens: which text each belongs to, as the network knows them.
        truncated: whether something of it was cut off.
    """

    ids: list[int]
    types: list[int]
    truncated: bool


class WordTokenizer:
    """Makes of pairs what ``backend`` makes of them, from the tokens of words. It is one thread's at a time.

    Args:
        backend: the Rust library's part of a fast tokenizer, which stays what it is now: no tokens are added to it, and
            none of its parts is replaced. Each call switches its truncation and padding off.

    Raises:
        ValueError: it is not known to tokenize a text word by word.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._cut = _cutter(backend)
        added = backend.get_added_tokens_decoder().values()
        if not self._cut.ascii_only and any(token.normalized for token in added):
            raise ValueError("an added token is looked for in normalized text")
        contents = {
            content for token in added for content in (token.content, unicodedata.normalize("NFC", token.content))
        }
        self._marks = {content[:MARK] for content in contents}
        if len(self._marks) > MOST_MARKS:
            raise ValueError(f"it has added tokens of {len(self._marks)} kinds")
        self._known: dict[str, tuple[int, ...]] = {}
        self._looked = self._new = 0  # words, and new ones among them, since the last look at their share
        self._without = 0  # words that are yet to go by without such a look, in whole texts
        self._special, self._types = self._template()

    def pairs(
        self, queries: Sequence[str], documents: Sequence[str], limit: int, side: str = "right"
    ) -> list[PairTokens | None]:
        """Pairs of a query and a document each, as tokens.

        Args:
            limit: the most tokens that a pair may have; from a longer one, a part of its document is cut off.
            side: the end of the document that is cut off: ``"right"`` or ``"left"``.

        Returns:
            Of each pair its tokens; ``None`` where its query is so long that the query would be cut as well.
        """
        before, between, after = self._special
        of_query, of_document = self._types
        room = limit - len(before) - len(between) - len(after)
        tokens = self.tokens({*queries, *documents})
        found: list[PairTokens | None] = []
        for query, document in zip(queries, documents, strict=True):
            first, second = tokens[query], tokens[document]
            left = room - len(first)
            truncated = len(second) > left
            if truncated:
                if len(first) > room // 2:
                    found.append(None)
                    continue
                second = second[:left] if side == "right" else second[len(second) - left :]
            ids = [*before, *first, *between, *second, *after]
            start = len(before) + len(first) + len(between)
            types = [of_query] * start + [of_document] * (len(ids) - start)
            found.append(PairTokens(ids, types, truncated))
        return found

    def tokens(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The tokens of each of ``texts``, without special ones."""
        self._backend.no_truncation()
        self._backend.no_padding()
        words: dict[str, list[str]] = {}
        whole = []
        for text in texts:
            small = text.lower() if self._cut.lower and text.isascii() else text
            if (
                self._without > 0
                or (self._cut.ascii_only and not text.isascii())
                # The small text too: a word of it may be an added token that the text itself has not.
                or any(mark in text or mark in small for mark in self._marks)
            ):
                whole.append(text)
                self._without = max(0, self._without - text.count(" ") - 1)
            else:
                words[text] = self._cut.word.findall(small)
        found = self._of_words(words)
        encodings = self._backend.encode_batch_fast(whole, add_special_tokens=False)
        found.update(zip(whole, (encoding.ids for encoding in encodings), strict=True))
        return found

    def _of_words(self, words: dict[str, list[str]]) -> dict[str, list[int]]:
        """The tokens of each text of ``words``."""
        new = list(set().union(*words.values()).difference(self._known))
        if new:
            self._known.update(zip(new, self._ask(new), strict=True))
        known = self._known.__getitem__
        found = {text: list(chain.from_iterable(map(known, cut))) for text, cut in words.items()}
        for word in new:
            if len(word) > LONGEST_WORD:
                del self._known[word]
        if len(self._known) > MOST_WORDS:
            self._known.clear()
        self._look(sum(map(len, words.values())), len(new))
        return found

    def _look(self, words: int, new: int) -> None:
        """See whether it is worth while: of so many ``words`` so many were ``new``."""
        self._looked += words
        self._new += new
        if self._looked >= WORDS_OF_A_LOOK:
            if self._new > MOST_NEW * self._looked:
                self._without = LOOKS_WITHOUT * WORDS_OF_A_LOOK
            self._looked = self._new = 0

    def _ask(self, words: list[str]) -> list[tuple[int, ...]]:
        """The tokens of each of ``words``: given together, since each call takes as long as some words do.

        Tuples of numbers are nothing to the garbage collector: as many lists would have it look through all that a
        worker has imported, for a second.
        """
        encoding = self._backend.encode(words, is_pretokenized=True, add_special_tokens=False)
        ids, counts = tuple(encoding.ids), Counter(encoding.word_ids)
        ends = list(accumulate(counts[number] for number in range(len(words))))
        if ends[-1] != len(ids):
            raise ValueError("a token is of no word")
        return [ids[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _template(self) -> tuple[tuple[list[int], list[int], list[int]], tuple[int, int]]:
        """The special tokens before, between and after the texts of a pair; the types of its two halves."""
        self._backend.no_truncation()
        self._backend.no_padding()
        encoding = self._backend.encode("a", "a")
        ids, types, texts = encoding.ids, encoding.type_ids, encoding.sequence_ids
        first, second, count = texts.index(0), texts.index(1), len(self.tokens(["a"])["a"])
        before, between, after = ids[:first], ids[first + count : second], ids[second + count :]
        halves = types[0], types[-1]
        rows = [*before, *ids[first : first + count], *between, *ids[second : second + count], *after]
        if rows != ids or types != [halves[0]] * second + [halves[1]] * (len(ids) - second):
            raise ValueError("its pairs are not a query and a document with special tokens around them")
        return (before, between, after), halves


def _cutter(backend: Tokenizer) -> _Cutter:
    """How texts of ``backend`` are cut into words, or ``ValueError``."""
    match backend.model, backend.pre_tokenizer, backend.normalizer:
        case (
            models.WordPiece(),
            pre_tokenizers.BertPreTokenizer(),
            normalizers.BertNormalizer(clean_text=True) as normalizer,
        ):
            return _Cutter(BERT_WORD, normalizer.lowercase, ascii_only=False)
        case (
            models.BPE(dropout=None),
            pre_tokenizers.ByteLevel(use_regex=True, add_prefix_space=False),
            normalizers.NFC() | None,
        ):
            return _Cutter(GPT2_WORD, lower=False, ascii_only=True)
    raise ValueError("its tokenizer is not known to tokenize word by word")
