"""One request on its way through the pool: its pairs, its scores so far, and the future that waits for them."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Pair", "PoolFuture", "Request", "Scores"]

Pair = tuple[str, str]
Scores = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)
_numbers = itertools.count()


class PoolFuture(Future[Any]):
    """A future whose done-callbacks run on threads of their own.

    A ``Future`` runs them on the thread that resolves it: here the dispatcher, which a callback that sleeps, raises or
    closes the pool would stop for everybody.
    """

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
        priority: each step doubles its share of the workers.
        deadline: when it expires, on the monotonic clock.
        timeout: the limit behind the deadline, in seconds, for the error message.
        partial: whether it then gets what is scored, rather than ``RequestTimeoutError``.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        tokens: Sequence[int],
        finish: Callable[[Scores, npt.NDArray[np.bool_]], Any],
        *,
        priority: int = 0,
        deadline: float | None = None,
        timeout: float | None = None,
        partial: bool = False,
    ) -> None:
        self.number = next(_numbers)
        self.pairs = pairs
        self.tokens = tokens
        self.total_tokens = sum(tokens)
        self.waiting_tokens = self.total_tokens
        self.finish = finish
        self.weight = 2.0**priority
        self.deadline = deadline
        self.timeout = timeout
        self.partial = partial
        self.future = PoolFuture()

        # Longest first: what goes out together is then of like length, and the short ones fill the gaps at the end.
        self.todo = deque(sorted(range(len(pairs)), key=tokens.__getitem__, reverse=True))
        self.alone: deque[int] = deque()  # suspects, each to be scored in a slice of its own
        self.attempts: dict[int, int] = {}  # workers that died on a pair, for those on which any did
        self.scores: Scores | None = None
        self.scored = np.zeros(len(pairs), dtype=np.bool_)
        self.missing = len(pairs)
        self.slices = 0
        self.virtual_time = 0.0
        self.done = False

    def __repr__(self) -> str:
        state = "done" if self.done else f"{len(self.pairs) - self.missing}/{len(self.pairs)} scored"
        return f"<Request {self.number}: {state}>"

    @property
    def waiting(self) -> int:
        """Pairs not yet sent to a worker."""
        return len(self.todo) + len(self.alone)

    def fill(self, indices: Sequence[int], scores: Scores) -> None:
        """Take the scores of ``indices``, each of which comes exactly once."""
        if self.scores is None:
            self.scores = np.full((len(self.pairs), *scores.shape[1:]), np.nan, dtype=np.float32)
        self.scores[indices] = scores
        self.scored[indices] = True
        self.missing -= len(indices)

    def resolve(self) -> None:
        """Give the future its result: everything, or what is there."""
        if not self._claim():
            return
        scores = self.scores if self.scores is not None else np.full(len(self.pairs), np.nan, dtype=np.float32)
        try:
            result = self.finish(scores, self.scored)
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

    def _claim(self) -> bool:
        """Whether the future waits for an outcome, which nobody but the caller of this will give it."""
        self.done = True
        try:
            return self.future.set_running_or_notify_cancel()
        except (InvalidStateError, RuntimeError):  # its owner has set it: his loss
            return False
