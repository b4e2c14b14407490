"""The queue: which pairs a worker gets next. Pure: no threads, no clock, no processes.

Fairness is start-time fair queueing (Goyal, Vin and Cheng, 1996): a request carries a virtual time that grows by the
tokens taken from it, divided by its weight; the smallest goes next, and a newcomer starts at the queue's present. So a
request of 5,000 documents does not hold up one of 10 that comes after it, and no weight, however small, starves.

A pair is in exactly one place: waiting in its request, out in one slice, scored, or dropped with its request.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mp_rerank.request import Pair, Request, Scores

__all__ = ["RequestQueue", "Slice", "Suspect"]


@dataclass(frozen=True, eq=False)
class Slice:
    """What one worker gets at a time: pairs of one request or of several."""

    parts: Sequence[tuple[Request, Sequence[int]]]
    tokens: int

    @property
    def pairs(self) -> list[Pair]:
        """The pairs, in the order their scores are expected."""
        return [request.pairs[i] for request, indices in self.parts for i in indices]

    def __len__(self) -> int:
        return sum(len(indices) for _, indices in self.parts)


@dataclass(frozen=True)
class Suspect:
    """A pair that was alone with a worker when something went wrong, as often as is allowed."""

    request: Request
    index: int
    attempts: int


class RequestQueue:
    """The live requests of one model, and the order they are served in.

    Attributes:
        live: requests neither resolved nor dropped, whether their pairs are waiting or out.
        waiting_tokens: estimated tokens of all pairs not out in a slice.
    """

    def __init__(self) -> None:
        self.live: dict[int, Request] = {}
        self.waiting_tokens = 0
        self._clock = 0.0
        self._order: list[tuple[float, int, Request]] = []  # a heap; entries of finished requests are passed over
        self._deadlines: list[tuple[float, int, Request]] = []  # likewise

    def __repr__(self) -> str:
        return f"<RequestQueue: {len(self.live)} live, {self.waiting_tokens} tokens waiting>"

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn; it may have waited, unsliced, in another queue."""
        self.live[request.number] = request
        self.waiting_tokens += sum(request.tokens[i] for i in (*request.todo, *request.alone))
        request.virtual_time = self._clock
        self._push(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number, request))

    def take(self, budget: int) -> Slice | None:
        """The next slice: of at most ``budget`` tokens, or of a single pair; ``None`` if nothing waits."""
        parts: list[tuple[Request, list[int]]] = []
        tokens = 0
        while self._order:
            _, _, request = self._order[0]
            if request.done or not request.waiting:
                heapq.heappop(self._order)
                continue
            if parts and (request.alone or tokens + request.tokens[request.todo[0]] > budget):
                break
            heapq.heappop(self._order)
            self._clock = max(self._clock, request.virtual_time)
            indices = []
            cost = 0
            if request.alone:
                indices.append(request.alone.popleft())
                cost = request.tokens[indices[0]]
                budget = 0
            else:
                while request.todo and (
                    not (parts or indices) or tokens + cost + request.tokens[request.todo[0]] <= budget
                ):
                    indices.append(request.todo.popleft())
                    cost += request.tokens[indices[-1]]
            parts.append((request, indices))
            tokens += cost
            request.slices += 1
            request.virtual_time += cost / request.weight
            self._push(request)
            if tokens >= budget:
                break
        self.waiting_tokens -= tokens
        return Slice(parts, tokens) if parts else None

    def fill(self, piece: Slice, scores: Scores) -> list[Request]:
        """Take the scores of ``piece``; returns the requests that now have all of theirs, no longer live."""
        complete = []
        start = 0
        for request, indices in piece.parts:
            stop = start + len(indices)
            if not request.done:
                request.fill(indices, scores[start:stop])
                if request.missing == 0:
                    complete.append(request)
            start = stop
        for request in complete:
            self.drop(request)
        return complete

    def put_back(self, piece: Slice) -> None:
        """Let the pairs of ``piece`` wait again: it never ran, through no fault of theirs."""
        for request, indices in piece.parts:
            if not request.done:
                self._return(request, indices)

    def crashed(self, piece: Slice, max_attempts: int) -> Suspect | None:
        """The worker died on ``piece``: let its pairs wait again, one by one if it was not their first such worker.

        Returns:
            The pair to blame, if ``piece`` is that one pair and has now ended ``max_attempts`` workers.
        """
        alone_from = max(1, max_attempts - 1)
        for request, indices in piece.parts:
            if request.done:
                continue
            for i in indices:
                request.attempts[i] = request.attempts.get(i, 0) + 1
            if len(piece) == 1 and request.attempts[indices[0]] >= max_attempts:
                return Suspect(request, indices[0], request.attempts[indices[0]])
            self._return(request, [i for i in indices if request.attempts[i] < alone_from])
            self._return(request, [i for i in indices if request.attempts[i] >= alone_from], alone=True)
        return None

    def raised(self, piece: Slice) -> Suspect | None:
        """The model raised on ``piece``: let its pairs wait again, one by one.

        Returns:
            The pair to blame, if ``piece`` is that one pair.
        """
        for request, indices in piece.parts:
            if request.done:
                continue
            if len(piece) == 1:
                return Suspect(request, indices[0], 1)
            self._return(request, indices, alone=True)
        return None

    def drop(self, request: Request) -> None:
        """Forget ``request``: it is complete, cancelled, expired or failed. Pairs still waiting never go out."""
        if self.live.pop(request.number, None) is not None:
            self.waiting_tokens -= sum(request.tokens[i] for i in (*request.todo, *request.alone))
            request.todo.clear()
            request.alone.clear()

    def drop_untouched(self) -> list[Request]:
        """Forget, and return in order of arrival, the requests no pair of which has gone out."""
        untouched = [request for request in self.live.values() if request.slices == 0]
        for request in untouched:
            del self.live[request.number]
            self.waiting_tokens -= request.total_tokens
        kept = [entry for entry in self._order if entry[2].number in self.live]
        heapq.heapify(kept)
        self._order = kept
        return untouched

    def expire(self, now: float) -> list[Request]:
        """Forget, and return, the requests whose deadline is at or before ``now``."""
        expired = []
        while self._deadlines and (self._deadlines[0][0] <= now or self._deadlines[0][2].number not in self.live):
            request = heapq.heappop(self._deadlines)[2]
            if request.number in self.live:
                self.drop(request)
                expired.append(request)
        return expired

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request, on the clock its requests use."""
        while self._deadlines and self._deadlines[0][2].number not in self.live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _push(self, request: Request) -> None:
        if request.waiting:
            heapq.heappush(self._order, (request.virtual_time, request.number, request))

    def _return(self, request: Request, indices: Sequence[int], *, alone: bool = False) -> None:
        if not indices:
            return
        queued = request.waiting > 0
        if alone:
            request.alone.extend(indices)
        else:
            request.todo.extendleft(reversed(indices))
        cost = sum(request.tokens[i] for i in indices)
        self.waiting_tokens += cost
        if queued:
            return  # its entry is in the heap
        request.virtual_time = max(self._clock, request.virtual_time - cost / request.weight)
        self._push(request)
