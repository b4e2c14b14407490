"""Counts for each caller. Pure; the dispatcher's thread alone changes it, and any thread may take a snapshot."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Literal

from mp_rerank._scheduling.request import Request
from mp_rerank.results import CallerStats

__all__ = ["MAX_IDLE_CALLERS", "CallerCounts"]

# So many callers with nothing pending are remembered: callers may be as many as conversations.
MAX_IDLE_CALLERS = 1000


class CallerCounts:
    """The counts of callers that have something pending, and of the ``MAX_IDLE_CALLERS`` that had so last."""

    def __init__(self) -> None:
        self._counts: dict[str, CallerStats] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()  # the one idle for longest first

    def admitted(self, request: Request) -> None:
        """Count ``request``, which is pending from now on."""
        counts = self._counts.setdefault(request.caller, CallerStats())
        self._idle.pop(request.caller, None)
        counts.submitted += 1
        counts.pending_requests += 1
        counts.pending_pairs += len(request.pairs)

    def done(self, request: Request, outcome: Literal["completed", "failed", "cancelled", "timed_out"]) -> None:
        """Count how ``request`` ended, which is pending no longer."""
        counts = self._counts[request.caller]
        counts.pending_requests -= 1
        counts.pending_pairs -= len(request.pairs)
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        if not counts.pending_requests:
            self._idle[request.caller] = None
            if len(self._idle) > MAX_IDLE_CALLERS:
                del self._counts[self._idle.popitem(last=False)[0]]

    def snapshot(self) -> dict[str, CallerStats]:
        """A copy."""
        found = list(self._counts.items())  # in one step: see `Dispatcher.ask`
        return {caller: dataclasses.replace(counts) for caller, counts in found}
