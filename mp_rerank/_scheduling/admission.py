"""The bound on pending work, and the line before it. Pure: no threads, no clock, no locks.

The dispatcher's thread alone calls it, but for `is_far_from_bound`: a caller so far from the bound need not wait for
the dispatcher's answer.
"""

from __future__ import annotations

import heapq
import math
from typing import Literal

from mp_rerank._scheduling.request import Request
from mp_rerank.errors import PoolOverloadedError

__all__ = ["Admission"]


class Admission:
    """Counts admitted pairs and tokens, and holds requests back at the bound, first come first served.

    A request larger than the bound itself is admitted when nothing else is pending: it would never be otherwise.

    Args:
        max_pairs, max_tokens: the bound.
        overload: ``"block"``, ``"raise"``, or seconds to wait before a request is refused.

    Attributes:
        pairs, tokens: what is admitted and not finished now.
    """

    def __init__(self, max_pairs: int, max_tokens: int, overload: Literal["block", "raise"] | float) -> None:
        self.max_pairs = max_pairs
        self.max_tokens = max_tokens
        self.patience = math.inf if overload == "block" else 0.0 if overload == "raise" else float(overload)
        self.pairs = 0
        self.tokens = 0
        self._line: dict[int, Request] = {}  # by their numbers, in the order they came
        self._expiries: list[tuple[float, int]] = []  # a heap; those who have left the line since are passed over

    def __repr__(self) -> str:
        return f"<Admission: {self.pairs} pairs and {self.tokens} tokens pending, {len(self._line)} requests in line>"

    def enter(self, request: Request, now: float) -> bool:
        """Admit ``request``, or let it stand in line; whether it is admitted. Without patience it is in line all the
        same, and ``expire`` has it at once.
        """
        if not self._line and self._fits(request):
            self._take(request)
            return True
        self._line[request.number] = request
        until = now + self.patience if request.deadline is None else min(now + self.patience, request.deadline)
        if until < math.inf:
            heapq.heappush(self._expiries, (until, request.number))
        return False

    def leave(self, request: Request) -> None:
        """Give the place of ``request``, which was admitted, back."""
        self.pairs -= len(request.pairs)
        self.tokens -= request.total_tokens

    def let_in(self) -> list[Request]:
        """Admit from the line whoever there is room for, in order."""
        admitted = []
        while self._line:
            request = next(iter(self._line.values()))
            if not self._fits(request):
                break
            del self._line[request.number]
            self._take(request)
            admitted.append(request)
        return admitted

    def give_up(self, request: Request) -> bool:
        """Take ``request`` out of the line; whether it stood there."""
        return self._line.pop(request.number, None) is not None

    def expire(self, now: float) -> list[Request]:
        """Take out of the line, and return, the requests whose patience or deadline is at or before ``now``."""
        expired = []
        while (until := self.next_expiry()) is not None and until <= now:
            expired.append(self._line.pop(heapq.heappop(self._expiries)[1]))
        return expired

    def clear(self) -> list[Request]:
        """Take everybody out of the line."""
        waiting = list(self._line.values())
        self._line.clear()
        return waiting

    def next_expiry(self) -> float | None:
        """When ``expire`` has somebody next."""
        while self._expiries and self._expiries[0][1] not in self._line:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def is_far_from_bound(self, request: Request, times: int) -> bool:
        """Whether there is room for ``times`` requests like this one in half of the bound. Any thread may ask.

        So many may be on their way to the dispatcher, which has not counted them yet; larger ones among them have asked
        the same. The other half is for those that wait to be admitted.
        """
        return (
            not self._line
            and 2 * (self.pairs + times * len(request.pairs)) <= self.max_pairs
            and 2 * (self.tokens + times * request.total_tokens) <= self.max_tokens
        )

    def refusal(self, request: Request) -> PoolOverloadedError:
        """The error for a request that there was no room for."""
        return PoolOverloadedError(
            f"{self.pairs} pairs ({self.tokens} tokens) are pending; no room for {len(request.pairs)} "
            f"({request.total_tokens}) within max_pending_pairs={self.max_pairs} and "
            f"max_pending_tokens={self.max_tokens}",
            pending_pairs=self.pairs,
            pending_tokens=self.tokens,
        )

    def _fits(self, request: Request) -> bool:
        return not self.pairs or (
            self.pairs + len(request.pairs) <= self.max_pairs and self.tokens + request.total_tokens <= self.max_tokens
        )

    def _take(self, request: Request) -> None:
        self.pairs += len(request.pairs)
        self.tokens += request.total_tokens
