"""The bound on pending work: the only lock a caller's thread meets on its way in.

A caller may be interrupted at any moment: Ctrl-C raises in the main thread, after any call and at the start of any
function. So the lock is a bare one, whose ``with`` cannot be interrupted between taking it and being inside; that of a
``Condition``, which is written in Python, can, and left everybody outside for good (measured: after 3 of 1,690
interrupts of ``submit``). And what changes together changes with no call in between.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from mp_rerank._scheduling.futures import SIGNAL_CHECK_SECONDS, Answer
from mp_rerank.errors import PoolClosedError, PoolOverloadedError, RequestTimeoutError

__all__ = ["Admission"]


@dataclass(eq=False)
class _Waiting:
    """A caller in line, whose ``turn`` somebody else gives."""

    pairs: int
    tokens: int
    turn: Answer[None] = field(default_factory=Answer)


class Admission:
    """Counts admitted pairs and tokens, and holds callers back at the bound, first come first served.

    A request larger than the bound itself is admitted when nothing else is pending: it would never be otherwise.

    Args:
        max_pairs, max_tokens: the bound.
        overload: ``"block"``, ``"raise"``, or seconds to wait before raising.

    Attributes:
        pairs, tokens: what is pending now.
    """

    def __init__(self, max_pairs: int, max_tokens: int, overload: Literal["block", "raise"] | float) -> None:
        self.max_pairs = max_pairs
        self.max_tokens = max_tokens
        self.patience = math.inf if overload == "block" else 0.0 if overload == "raise" else float(overload)
        self.pairs = 0
        self.tokens = 0
        self._closed = False
        self._lock = threading.Lock()
        self._places: dict[Hashable, tuple[int, int]] = {}
        self._line: dict[Hashable, _Waiting] = {}

    def admit(
        self,
        who: Hashable,
        pairs: int,
        tokens: int,
        deadline: float | None = None,
        timeout: float | None = None,
        *,
        may_wait: bool = True,
    ) -> bool:
        """Take a place for ``pairs`` and ``tokens``.

        Whoever is interrupted here cannot know whether there is a place: ``release`` leaves none behind.

        Args:
            who: whose place it is, once: what ``release`` is told.
            pairs, tokens: the request's size.
            deadline: the request's own, on the monotonic clock, and ``timeout``, the seconds it was made of.
            may_wait: whether to wait for a place.

        Returns:
            Whether it has one: ``False`` only where it may not wait and would have to.

        Raises:
            PoolOverloadedError: there was no room, within the patience configured.
            RequestTimeoutError: the deadline came first.
            PoolClosedError: the pool was closed, perhaps meanwhile.
        """
        with self._lock:
            if self._closed:
                raise PoolClosedError("the pool is closed")
            if not self._line and self._fits(pairs, tokens):
                self._take(who, pairs, tokens)
                return True
            if not may_wait:
                return False
            waiting = self._line[who] = _Waiting(pairs, tokens)
        patient_until = time.monotonic() + self.patience
        until = patient_until if deadline is None else min(patient_until, deadline)
        while True:
            left = until - time.monotonic()
            waiting.turn.wait(min(SIGNAL_CHECK_SECONDS, left))
            with self._lock:
                self._let_in()  # again, in case who should have done it was interrupted
                if who in self._places:
                    return True
                if self._closed:
                    raise PoolClosedError("the pool was closed while this request waited to be admitted")
                if left > SIGNAL_CHECK_SECONDS:
                    continue
                del self._line[who]
                self._let_in()  # who stood behind may be smaller
                pending = self.pairs, self.tokens
            break
        if until == deadline:
            raise RequestTimeoutError(
                f"the request waited {timeout:g} s to be admitted", timeout=timeout or 0.0, total=pairs
            )
        raise PoolOverloadedError(
            f"{pending[0]} pairs ({pending[1]} tokens) are pending; no room for {pairs} ({tokens}) within "
            f"max_pending_pairs={self.max_pairs} and max_pending_tokens={self.max_tokens}",
            pending_pairs=pending[0],
            pending_tokens=pending[1],
        )

    def release(self, who: Hashable) -> None:
        """Give the place of ``who`` back, in the line or past it; nothing where it has none."""
        with self._lock:
            if who in self._line:
                del self._line[who]
            if who in self._places:
                pairs, tokens = self._places[who]
                del self._places[who]
                self.pairs -= pairs
                self.tokens -= tokens
            self._let_in()

    def close(self) -> None:
        """Turn away everybody in line, and whoever comes."""
        with self._lock:
            self._closed = True
            for waiting in self._line.values():
                waiting.turn.give(None)
            self._line.clear()

    def _let_in(self) -> None:
        """Admit from the line whoever there is room for, in order."""
        while self._line:
            who, first = next(iter(self._line.items()))
            if not self._fits(first.pairs, first.tokens):
                return
            self._take(who, first.pairs, first.tokens)
            first.turn.give(None)

    def _fits(self, pairs: int, tokens: int) -> bool:
        return not self.pairs or (self.pairs + pairs <= self.max_pairs and self.tokens + tokens <= self.max_tokens)

    def _take(self, who: Hashable, pairs: int, tokens: int) -> None:
        if who in self._line:
            del self._line[who]
        self._places[who] = pairs, tokens
        self.pairs += pairs
        self.tokens += tokens
