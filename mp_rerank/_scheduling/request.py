"""One request: its pairs, the scores it has so far, and the future that gets its result."""

from __future__ import annotations

import enum
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import InvalidStateError
from typing import Any

import numpy as np
import numpy.typing as npt

from mp_rerank._pairs import PLAIN, Pair, PairOptions, Reading, Score, estimate_pair, estimate_text
from mp_rerank._scheduling.futures import Answer, PoolFuture, RequestTimes
from mp_rerank._workers.child import WorkerFacts
from mp_rerank.results import RerankResult, Scores

__all__ = [
    "DEFAULT_CALLER",
    "PairState",
    "PendingPair",
    "Request",
    "all_scores",
    "estimate_lengths",
    "misfit",
    "nothing",
    "rank",
]

#: whose requests are that name nobody
DEFAULT_CALLER = "default"

#: makes a request's result; see `Request`
Finish = Callable[[Scores, "npt.NDArray[np.bool_]", Sequence[Reading | None]], Any]

# By the field of the pair's options.
NEEDS_TOKENIZER = "it needs a CrossEncoder whose tokenizer is a fast one, which tells where its tokens are in a text"
WHY_NOT = {
    "prompt": "it needs a CrossEncoder whose predict takes a prompt, as that of sentence-transformers 6 does",
    "max_tokens_per_doc": NEEDS_TOKENIZER,
    "truncation": NEEDS_TOKENIZER,
    "long_documents": NEEDS_TOKENIZER,
}

_numbers = itertools.count()


class PairState(enum.Enum):
    """Where a pending pair is, for all that want it at once."""

    WAITING = "waiting"  # for the turn of any of them
    ALONE = "waiting to be scored in a slice of its own"
    OUT = "out"  # in one slice
    SCORED = "scored"


class PendingPair:
    """A query and a document, until they are scored: the queue's unit of work.

    Attributes:
        key: equal for equal pairs.
        texts: the query and the document.
        options: how they are read.
        tokens: their estimated tokens.
        state: where it is.
        wanted_by: the live requests that want its score, each once.
        attempts: workers that died on it.
        score: once it is scored: a number, or one for each label.
        reading: what the model read of it, if it tells.
    """

    __slots__ = ("attempts", "key", "options", "reading", "score", "state", "texts", "tokens", "wanted_by")

    def __init__(self, key: Hashable, texts: Pair, tokens: int, options: PairOptions = PLAIN) -> None:
        self.key = key
        self.texts = texts
        self.options = options
        self.tokens = tokens
        self.state = PairState.WAITING
        self.wanted_by: list[Request] = []
        self.attempts = 0
        self.score: Score | None = None
        self.reading: Reading | None = None

    def __repr__(self) -> str:
        return f"<PendingPair: {self.state.value}, wanted by {len(self.wanted_by)}>"


class Request:
    """What one ``submit`` asked for. Made by the caller's thread; from then on only the dispatcher's touches it.

    Args:
        pairs: the pairs to score, as exact ``str``.
        tokens: the estimated tokens of each.
        finish: makes the future's result of the scores, shape (n,) or (n, num_labels), a mask, shape (n,), of which are
            there (the rest of the scores is NaN), and what was read of each pair, where that is known.
        options: how its pairs are read.
        keys: for each pair what equal pairs have in common; ``None``: the pairs themselves, and the options.
        caller: whose it is.
        priority: each step doubles its share of what its caller is given.
        deadline: when it expires, on the monotonic clock.
        timeout: the limit behind the deadline, in seconds, for the error message.
        partial: whether it then gets what is scored, rather than ``RequestTimeoutError``.
        num_labels: scores a pair that the model gives, as far as is known while there are none.
        ranking: whether ``finish`` needs that to be one.
        on_scores: given the scores as they come: lists of an index and its score. For what is known to be quick.

    Attributes:
        future: gets the result.
        admitted: given once there is room for it; the error if there is none in time.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokens: Sequence[int],
        finish: Finish,
        *,
        options: PairOptions = PLAIN,
        keys: Sequence[Hashable] | None = None,
        caller: str = DEFAULT_CALLER,
        priority: int = 0,
        deadline: float | None = None,
        timeout: float | None = None,
        partial: bool = False,
        num_labels: int = 1,
        ranking: bool = False,
        on_scores: Callable[[list[tuple[int, Score]]], object] | None = None,
    ) -> None:
        self.number = next(_numbers)
        self.pairs = pairs
        self.tokens = tokens
        self.total_tokens = sum(tokens)
        self.options = options
        if keys is None:
            keys = pairs if options is PLAIN else [(pair, options) for pair in pairs]
        self.keys: Sequence[Hashable] = keys
        self.finish = finish
        self.caller = caller
        self.weight = 2.0**priority
        self.deadline = deadline
        self.timeout = timeout
        self.partial = partial
        self.num_labels = num_labels
        self.ranking = ranking
        self.on_scores = on_scores
        self.future = PoolFuture()
        self.admitted = Answer[None]()
        self._submitted_at = time.monotonic()

        # Longest first: what goes out together is then of like length, and the short ones fill the gaps at the end.
        self.order = sorted(range(len(pairs)), key=tokens.__getitem__, reverse=True)
        for key in self.keys:
            hash(key)  # a string keeps its hash: the dispatcher need not go through the texts
        self.done = False
        self.enter()

    def enter(self) -> None:
        """Be as new: nothing waits, and nothing is scored. What follows is up to the queue it is in."""
        self.wanted: list[PendingPair] = []  # one for each of the pairs, which equal ones share
        self.repeats: dict[PendingPair, int] = {}  # how often each is wanted, of those that are more than once
        # Lines of pairs to send out. What is not in a line's state has gone out, or come back into the other line.
        self.todo: deque[PendingPair] = deque()  # those that are WAITING
        self.alone: deque[PendingPair] = deque()  # those that are ALONE: suspects, each for a slice of its own
        self.waiting = 0  # pairs it wants that wait for somebody's turn, each counted once
        self.waiting_tokens = 0
        self.missing = len(self.pairs)
        self.slices = 0
        self._began_at = math.inf  # when a worker began with the first of its slices that were scored
        self._tokenize_seconds: float | None = None  # of those slices, as far as workers tell
        self.virtual_time = 0.0
        self.queued = False  # whether it stands in the queue's order of service
        self._places: dict[PendingPair, list[int]] = {}  # of ``wanted``, once somebody follows the scores

    def __repr__(self) -> str:
        state = "done" if self.done else f"{len(self.pairs) - self.missing}/{len(self.pairs)} scored"
        return f"<Request {self.number}: {state}>"

    def tell(self, pairs: Iterable[PendingPair]) -> None:
        """Give the scores of ``pairs``, which are new, to whoever follows them."""
        if self.on_scores is None:
            return
        if not self._places:
            for index, pair in enumerate(self.wanted):
                self._places.setdefault(pair, []).append(index)
        self.on_scores(
            [(index, pair.score) for pair in pairs for index in self._places[pair] if pair.score is not None]
        )

    def began(self, at: float, tokenize_seconds: float | None = None) -> None:
        """Note that a worker began at ``at`` with a slice that gave it scores, and how long that took to tokenize."""
        self._began_at = min(self._began_at, at)
        if tokenize_seconds is not None:
            self._tokenize_seconds = (self._tokenize_seconds or 0.0) + tokenize_seconds

    def complete(self, now: float) -> None:
        """Give the future its result, and how long all of it took."""
        began_at = max(self._submitted_at, self._began_at)  # an equal pair may have been there before
        self.future.times = RequestTimes(
            began_at - self._submitted_at, max(0.0, now - began_at), self._tokenize_seconds
        )
        self.resolve()

    def resolve(self) -> None:
        """Give the future its result: everything, or what is there."""
        scores, scored = self._scores()
        readings = [pair.reading for pair in self.wanted] or [None] * len(self.pairs)
        try:
            result = self.finish(scores, scored, readings)
        except BaseException as error:
            self._settle(error=error)
        else:
            self._settle(result)

    def fail(self, error: BaseException) -> None:
        """Give the future ``error``, unless its owner has cancelled it."""
        self._settle(error=error)

    def cancel(self) -> None:
        """Note that the future's owner has cancelled it."""
        self._settle()

    def _scores(self) -> tuple[Scores, npt.NDArray[np.bool_]]:
        """What ``finish`` takes."""
        scores = [pair.score for pair in self.wanted]
        one = next((score for score in scores if score is not None), None)
        if one is None:  # as of a request that never got as far as a queue
            shape = (len(self.pairs),) if self.num_labels == 1 else (len(self.pairs), self.num_labels)
            return np.full(shape, np.nan, dtype=np.float32), np.zeros(len(self.pairs), dtype=np.bool_)
        if not self.missing:
            return np.array(scores, dtype=np.float32), np.ones(len(scores), dtype=np.bool_)
        scored = [pair.state is PairState.SCORED for pair in self.wanted]
        nothing = [np.nan] * len(one) if isinstance(one, list) else np.nan
        rows = [nothing if score is None else score for score in scores]
        return np.array(rows, dtype=np.float32), np.array(scored, dtype=np.bool_)

    def _settle(self, result: Any = None, error: BaseException | None = None) -> None:
        self.done = True
        self._places = {}
        self.wanted = []  # a future that somebody keeps keeps this request, and need not keep what it shared
        if not self.future.claim():
            return
        try:
            if error is not None:
                self.future.set_exception(error)
            else:
                self.future.set_result(result)
        except InvalidStateError:  # its owner has set it: his loss
            pass


def estimate_lengths(pairs: Sequence[Pair], max_length: int | None, options: PairOptions = PLAIN) -> list[int]:
    """Estimated tokens of each pair, read by ``options``. Most requests have one query: it is measured once."""
    prompt = 0 if options.prompt is None else estimate_text(options.prompt)
    queries: dict[str, int] = {}
    lengths = []
    for query, document in pairs:
        tokens = queries.get(query)
        if tokens is None:
            tokens = queries[query] = prompt + estimate_text(query)
        lengths.append(estimate_pair(tokens, document, max_length, options))
    return lengths


def misfit(facts: WorkerFacts, options: PairOptions, *, ranking: bool) -> str | None:
    """Why a model with ``facts`` cannot do what a request asks; ``None``: it can.

    Args:
        options: how its pairs are to be read.
        ranking: whether they are to be ranked.
    """
    if facts.num_labels != 1:
        if ranking:
            return f"gives {facts.num_labels} scores a pair, and ranking needs one: use submit_pairs"
        if options.long_documents == "chunk":
            return f"gives {facts.num_labels} scores a pair: long_documents='chunk' needs one, to tell the best chunk"
    for name, value, default in zip(options._fields, options, PLAIN, strict=True):
        if value != default and name not in facts.takes:
            return f"cannot follow {'instruction' if name == 'prompt' else name}: {WHY_NOT[name]}"
    return None


def rank(
    documents: Sequence[str],
    top_n: int | None,
    min_score: float | None,
    records: Sequence[Mapping[str, Any] | None] | None,
    scores: Scores,
    scored: npt.NDArray[np.bool_],
    readings: Sequence[Reading | None],
) -> list[RerankResult]:
    """What ``finish`` makes of a ranking's scores: the best ``top_n`` documents, and behind them what has no score.

    Args:
        min_score: leave out what scores less, and what has no score.
    """
    order = np.argsort(-scores, kind="stable")  # NaN, and so what is unscored, comes last
    if min_score is not None:
        order = order[scores[order] >= min_score]
    values: list[float | None] = scores.tolist()
    if np.isnan(scores).any():
        values = [None if np.isnan(value) else value for value in scores.tolist()]
    results = []
    for i in order[:top_n].tolist():
        reading = readings[i] or (None, None, None)
        results.append(RerankResult(i, values[i], documents[i], None if records is None else records[i], *reading))
    return results


def all_scores(scores: Scores, scored: npt.NDArray[np.bool_], readings: Sequence[Reading | None]) -> Scores:
    """What ``finish`` makes of the scores where they are the result: NaN is where there is none."""
    return scores


def nothing(scores: Scores, scored: npt.NDArray[np.bool_], readings: Sequence[Reading | None]) -> None:
    """What ``finish`` makes of the scores of a request that somebody has followed."""
