"""The bound on pending work, and the line before it. Pure: no threads, no clock, no locks.

The dispatcher's thread alone calls it, but for `is_far_from_bound`: a caller so far from the bound need not wait for
the dispatcher's answer.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, OrderedDict
from typing import Literal

from mp_rerank._scheduling.request import Request
from mp_rerank.errors import PoolOverloadedError

__all__ = ["Admission"]

_Line = OrderedDict[int, Request]  # by their numbers, in the order they came


class Admission:
    """Counts admitted pairs and tokens, and holds requests back at the bound.

    Each caller has a line of its own, and is let in first come, first served. Where several callers wait for the pool's
    bound, one request of each is let in, in turns; nobody slips past the one whose turn it is, which might never find
    room then. A caller at its own bound has no turns, and holds up nobody else.

    A request larger than a bound itself is admitted when nothing else is pending, of anybody or of its caller: it would
    never be otherwise.

    Args:
        max_pairs, max_tokens: the bound.
        overload: ``"block"``, ``"raise"``, or seconds to wait before a request is refused.
        max_pairs_per_caller: the bound of each caller; ``None``: there is none but the pool's.

    Attributes:
        pairs, tokens: what is admitted and not finished now.
        pairs_of: the pairs of each caller that has any.
    """

    def __init__(
        self,
        max_pairs: int,
        max_tokens: int,
        overload: Literal["block", "raise"] | float,
        max_pairs_per_caller: int | None = None,
    ) -> None:
        self.max_pairs = max_pairs
        self.max_tokens = max_tokens
        self.max_pairs_per_caller = max_pairs_per_caller
        self.patience = math.inf if overload == "block" else 0.0 if overload == "raise" else float(overload)
        self.pairs = 0
        self.tokens = 0
        self.pairs_of: Counter[str] = Counter()
        self._line: dict[int, Request] = {}  # all who wait, by their numbers
        self._lines: dict[str, _Line] = {}  # the same, by their callers
        self._turns: OrderedDict[str, None] = OrderedDict()  # callers whose first has room within the caller's bound
        self._expiries: list[tuple[float, int]] = []  # a heap; those who have left the line since are passed over

    def __repr__(self) -> str:
        return f"<Admission: {self.pairs} pairs and {self.tokens} tokens pending, {len(self._line)} requests in line>"

    def enter(self, request: Request, now: float) -> bool:
        """Admit ``request``, or let it stand in line; whether it is admitted. Without patience it is in line all the
        same, and ``expire`` has it at once.
        """
        first = request.caller not in self._lines
        if first and not self._turns and self._fits_caller(request) and self._fits(request):
            self._take(request)
            return True
        self._line[request.number] = request
        self._lines.setdefault(request.caller, OrderedDict())[request.number] = request
        if first:
            self._look_at(request.caller)
        until = now + self.patience if request.deadline is None else min(now + self.patience, request.deadline)
        if until < math.inf:
            heapq.heappush(self._expiries, (until, request.number))
        return False

    def leave(self, request: Request) -> None:
        """Give the place of ``request``, which was admitted, back."""
        self.pairs -= len(request.pairs)
        self.tokens -= request.total_tokens
        self.pairs_of[request.caller] -= len(request.pairs)
        if not self.pairs_of[request.caller]:
            del self.pairs_of[request.caller]
        self._look_at(request.caller)

    def let_in(self) -> list[Request]:
        """Admit from the line whoever there is room for, in order."""
        admitted = []
        while self._turns:
            caller = next(iter(self._turns))
            request = next(iter(self._lines[caller].values()))
            if not self._fits(request):
                break
            self._take(request)
            del self._turns[caller]  # to stand behind the others
            self._leave_line(request)
            admitted.append(request)
        return admitted

    def give_up(self, request: Request) -> bool:
        """Take ``request`` out of the line; whether it stood there."""
        if request.number not in self._line:
            return False
        self._leave_line(request)
        return True

    def expire(self, now: float) -> list[Request]:
        """Take out of the line, and return, the requests whose patience or deadline is at or before ``now``."""
        expired = []
        while (until := self.next_expiry()) is not None and until <= now:
            request = self._line[heapq.heappop(self._expiries)[1]]
            self._leave_line(request)
            expired.append(request)
        return expired

    def clear(self) -> list[Request]:
        """Take everybody out of the line."""
        waiting = list(self._line.values())
        self._line.clear()
        self._lines.clear()
        self._turns.clear()
        return waiting

    def next_expiry(self) -> float | None:
        """When ``expire`` has somebody next."""
        while self._expiries and self._expiries[0][1] not in self._line:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def is_far_from_bound(self, request: Request, times: int) -> bool:
        """Whether there is room for ``times`` requests like this one in half of the bounds. Any thread may ask.

        So many may be on their way to the dispatcher, which has not counted them yet; larger ones among them have asked
        the same. The other half is for those that wait to be admitted.
        """
        pairs, tokens = times * len(request.pairs), times * request.total_tokens
        far = (
            not self._turns
            and request.caller not in self._lines
            and 2 * (self.pairs + pairs) <= self.max_pairs
            and 2 * (self.tokens + tokens) <= self.max_tokens
        )
        if not far or self.max_pairs_per_caller is None:
            return far
        return 2 * (self.pairs_of[request.caller] + pairs) <= self.max_pairs_per_caller

    def refusal(self, request: Request) -> PoolOverloadedError:
        """The error for a request that there was no room for."""
        if not self._fits_caller(request):
            words = (
                f"{self.pairs_of[request.caller]} pairs of caller {request.caller!r} are pending; no room for "
                f"{len(request.pairs)} within max_pending_pairs_per_caller={self.max_pairs_per_caller}"
            )
        else:
            words = (
                f"{self.pairs} pairs ({self.tokens} tokens) are pending; no room for {len(request.pairs)} "
                f"({request.total_tokens}) within max_pending_pairs={self.max_pairs} and "
                f"max_pending_tokens={self.max_tokens}"
            )
        return PoolOverloadedError(words, pending_pairs=self.pairs, pending_tokens=self.tokens)

    def _fits(self, request: Request) -> bool:
        return not self.pairs or (
            self.pairs + len(request.pairs) <= self.max_pairs and self.tokens + request.total_tokens <= self.max_tokens
        )

    def _fits_caller(self, request: Request) -> bool:
        pairs, limit = self.pairs_of[request.caller], self.max_pairs_per_caller
        return limit is None or not pairs or pairs + len(request.pairs) <= limit

    def _take(self, request: Request) -> None:
        self.pairs += len(request.pairs)
        self.tokens += request.total_tokens
        self.pairs_of[request.caller] += len(request.pairs)

    def _leave_line(self, request: Request) -> None:
        del self._line[request.number]
        line = self._lines[request.caller]
        del line[request.number]
        if not line:
            del self._lines[request.caller]
        self._look_at(request.caller)

    def _look_at(self, caller: str) -> None:
        """Give ``caller`` turns if it waits, and its first has room within its own bound; else take them away."""
        line = self._lines.get(caller)
        if line is not None and self._fits_caller(next(iter(line.values()))):
            self._turns.setdefault(caller)
        else:
            self._turns.pop(caller, None)
