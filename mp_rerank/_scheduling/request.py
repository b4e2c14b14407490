"""One request on its way through the pool: its pairs, its scores so far, and the future that waits for them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np
import numpy.typing as npt

from mp_rerank._pairs import Pair, PairState, PendingPair
from mp_rerank._scheduling.futures import Answer

__all__ = ["PoolFuture", "Request", "Scores"]

Scores = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class PoolFuture(Future[Any]):
    """A future whose done-callbacks run on threads of their own, and which Ctrl-C may interrupt.

    A ``Future`` runs its callbacks on the thread that resolves it: here the dispatcher, which one that sleeps, raises
    or closes the pool would stop for everybody. An interrupted ``result()`` could as well: see ``waiting``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settled = settled = Answer[None]()
        super().add_done_callback(lambda _: settled.give(None))

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future`` has it."""
        self._settled.wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future`` has it."""
        self._settled.wait(timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(self)`` once this future is done; at once, and here, if it is already."""
        if self.done():
            super().add_done_callback(fn)
        else:
            super().add_done_callback(lambda future: _call_apart(fn, future))

    def add_internal_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As ``Future`` has it: called on the resolving thread. For what is known to be quick."""
        super().add_done_callback(fn)


def _call_apart(fn: Callable[[Any], object], future: Any) -> None:
    def call() -> None:
        try:
            fn(future)
        except BaseException:  # SystemExit too: this thread is nobody else's
            logger.exception("a done-callback raised")

    try:
        threading.Thread(target=call, name="mp_rerank-callback", daemon=True).start()
    except RuntimeError:  # the system has no thread left, or the interpreter is leaving
        call()


class Request:
    """What one ``submit`` asked for. Made by the caller's thread; from then on only the dispatcher's touches it.

    Args:
        pairs: the pairs to score, as exact ``str``.
        tokens: the estimated tokens of each.
        finish: makes the future's result of the scores, shape (n,) or (n, num_labels), and a mask, shape (n,), of which
            are there; the rest of the scores is NaN.
        keys: for each pair what equal pairs have in common; ``None``: the pairs themselves.
        priority: each step doubles its share of the workers.
        deadline: when it expires, on the monotonic clock.
        timeout: the limit behind the deadline, in seconds, for the error message.
        partial: whether it then gets what is scored, rather than ``RequestTimeoutError``.
        num_labels: scores a pair that the model gives, as far as is known while there are none.
        ranking: whether ``finish`` needs that to be one.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokens: Sequence[int],
        finish: Callable[[Scores, npt.NDArray[np.bool_]], Any],
        *,
        keys: Sequence[Hashable] | None = None,
        priority: int = 0,
        deadline: float | None = None,
        timeout: float | None = None,
        partial: bool = False,
        num_labels: int = 1,
        ranking: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.pairs = pairs
        self.tokens = tokens
        self.total_tokens = sum(tokens)
        self.keys: Sequence[Hashable] = pairs if keys is None else keys
        self.finish = finish
        self.weight = 2.0**priority
        self.deadline = deadline
        self.timeout = timeout
        self.partial = partial
        self.num_labels = num_labels
        self.ranking = ranking
        self.future = PoolFuture()

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
        self.virtual_time = 0.0
        self.queued = False  # whether it stands in the queue's order of service

    def __repr__(self) -> str:
        state = "done" if self.done else f"{len(self.pairs) - self.missing}/{len(self.pairs)} scored"
        return f"<Request {self.number}: {state}>"

    def resolve(self) -> None:
        """Give the future its result: everything, or what is there."""
        scores, scored = self._scores()
        if not self._claim():
            return
        try:
            result = self.finish(scores, scored)
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def fail(self, error: BaseException) -> None:
        """Give the future ``error``, unless its owner has cancelled it."""
        if self._claim():
            self.future.set_exception(error)

    def cancel(self) -> None:
        """Acknowledge that the future's owner has cancelled it."""
        self._claim()

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

    def _claim(self) -> bool:
        """Whether the future waits for an outcome, which nobody but the caller of this will give it."""
        self.done = True
        self.wanted = []  # a future that somebody keeps keeps this request, and need not keep what it shared
        try:
            return self.future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):  # its owner has set it: his loss
            return False
