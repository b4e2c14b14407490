"""The bound on pending work: the only lock a caller's thread meets on its way in."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Literal

from mp_rerank.errors import PoolClosedError, PoolOverloadedError, RequestTimeoutError

__all__ = ["Admission"]


class Admission:
    """Counts admitted pairs and tokens, and holds callers back at the bound, first come first served.

    A request larger than the bound itself is admitted when nothing else is pending: it would never be otherwise.

    Args:
        max_pairs, max_tokens: the bound.
        overload: ``"block"``, ``"raise"``, or seconds to wait before raising.
    """

    def __init__(self, max_pairs: int, max_tokens: int, overload: Literal["block", "raise"] | float) -> None:
        self.max_pairs = max_pairs
        self.max_tokens = max_tokens
        self.patience = None if overload == "block" else 0.0 if overload == "raise" else float(overload)
        self.pairs = 0
        self.tokens = 0
        self._closed = False
        self._turn = threading.Condition()
        self._line: deque[object] = deque()

    def admit(
        self,
        pairs: int,
        tokens: int,
        deadline: float | None = None,
        timeout: float | None = None,
        *,
        may_wait: bool = True,
    ) -> bool:
        """Take a place for ``pairs`` and ``tokens``.

        Args:
            pairs, tokens: the request's size.
            deadline: the request's own, on the monotonic clock, and ``timeout``, the seconds it was made of.
            may_wait: whether to wait for a place.

        Returns:
            Whether it has one: ``False`` only where it may not wait and would have to.

        Raises:
            PoolOverloadedError: there was no room, within the patience configured.
            RequestTimeoutError: the deadline came first.
            PoolClosedError: the pool was closed meanwhile.
        """
        ticket = object()
        with self._turn:
            if not self._line and self._fits(pairs, tokens):
                self._take(pairs, tokens)
                return True
            if not may_wait:
                return False
            limit = None if self.patience is None else time.monotonic() + self.patience
            if deadline is not None:
                limit = deadline if limit is None else min(limit, deadline)
            self._line.append(ticket)
            try:
                admitted = self._turn.wait_for(
                    lambda: self._closed or (self._line[0] is ticket and self._fits(pairs, tokens)),
                    None if limit is None else min(threading.TIMEOUT_MAX, max(0.0, limit - time.monotonic())),
                )
                if self._closed:
                    raise PoolClosedError("the pool was closed while this request waited to be admitted")
                if admitted:
                    self._take(pairs, tokens)
                    return True
                if deadline is not None and limit == deadline:
                    raise RequestTimeoutError(
                        f"the request waited {timeout:g} s to be admitted", timeout=timeout or 0.0, total=pairs
                    )
                raise PoolOverloadedError(
                    f"{self.pairs} pairs ({self.tokens} tokens) are pending; no room for {pairs} ({tokens}) within "
                    f"max_pending_pairs={self.max_pairs} and max_pending_tokens={self.max_tokens}",
                    pending_pairs=self.pairs,
                    pending_tokens=self.tokens,
                )
            finally:
                self._line.remove(ticket)
                self._turn.notify_all()

    def release(self, pairs: int, tokens: int) -> None:
        """Give the place back."""
        with self._turn:
            self.pairs -= pairs
            self.tokens -= tokens
            if self._line:
                self._turn.notify_all()

    def close(self) -> None:
        """Turn away everybody in line, and whoever comes."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()

    def _fits(self, pairs: int, tokens: int) -> bool:
        if self._closed:
            raise PoolClosedError("the pool is closed")
        return not self.pairs or (self.pairs + pairs <= self.max_pairs and self.tokens + tokens <= self.max_tokens)

    def _take(self, pairs: int, tokens: int) -> None:
        self.pairs += pairs
        self.tokens += tokens
