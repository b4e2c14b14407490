"""The queue: which pairs a worker gets next. Pure: no threads, no clock, no processes.

Fairness is weighted fair queueing (Demers, Keshav and Shenker, 1989). The queue's virtual time is what each request
waiting would have been given by now, per unit of weight, had the workers been shared out exactly. A newcomer starts at
its present; what is taken from a request moves the request on by its tokens over its weight; and next is whichever
would be first to finish its next piece. So a request of 5,000 documents does not hold up one of 10 that comes after it.
And since virtual time goes on with every slice, whoever waits is overtaken by later requests for a bounded amount of
work only: neither a stream of small ones nor any priority starves anybody.

A pair is in exactly one place: waiting in its request, out in one slice, scored, or dropped with its request.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from mp_rerank.request import Pair, Request, Scores

__all__ = ["RequestQueue", "Slice", "Suspect"]

# A request's next piece, for the order of service: requests of fewer tokens come before larger ones of the same age.
PIECE_TOKENS = 1024


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
        self._virtual_time = 0.0
        self._weight = 0.0  # of the requests with pairs waiting; weights are powers of two, so the sum stays exact
        # Heaps of numbers, so that an entry waiting to be passed over keeps no finished request in memory.
        self._order: list[tuple[float, int]] = []
        self._deadlines: list[tuple[float, int]] = []

    def __repr__(self) -> str:
        return f"<RequestQueue: {len(self.live)} live, {self.waiting_tokens} tokens waiting>"

    def add(self, request: Request) -> None:
        """Let ``request`` wait for its turn; it may have waited, unsliced, in another queue."""
        self.live[request.number] = request
        self.waiting_tokens += request.waiting_tokens
        request.virtual_time = self._virtual_time
        self._weight += request.weight
        self._push(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number))

    def take(self, budget: int) -> Slice | None:
        """The next slice: of at most ``budget`` tokens, or of a single pair; ``None`` if nothing waits.

        It is a piece of the request whose turn it is and, if that is all of it, what else comes next and fits whole: a
        small request neither waits for a large one's pairs in its slice nor is split to fill another's.
        """
        parts: list[tuple[Request, list[int]]] = []
        tokens = 0
        weight = self._weight
        while self._order and tokens < budget:
            request = self.live.get(self._order[0][1])
            if request is None:
                heapq.heappop(self._order)
                continue
            if parts and (request.alone or tokens + request.waiting_tokens > budget):
                break
            heapq.heappop(self._order)
            if request.alone:
                indices = [request.alone.popleft()]
                cost = request.tokens[indices[0]]
                budget = 0
            else:
                indices = [request.todo.popleft()]
                cost = request.tokens[indices[0]]
                while request.todo and tokens + cost + request.tokens[request.todo[0]] <= budget:
                    indices.append(request.todo.popleft())
                    cost += request.tokens[indices[-1]]
            parts.append((request, indices))
            tokens += cost
            request.slices += 1
            request.waiting_tokens -= cost
            request.virtual_time += cost / request.weight
            if request.waiting:
                self._push(request)
            else:
                self._weight -= request.weight
        if not parts:
            return None
        self.waiting_tokens -= tokens
        self._virtual_time += tokens / weight
        return Slice(parts, tokens)

    def fill(self, piece: Slice, scores: Scores) -> list[Request]:
        """Take the scores of ``piece``; returns the requests that now have all of theirs, no longer live."""
        complete = []
        start = 0
        for request, indices in piece.parts:
            stop = start + len(indices)
            if request.number in self.live:
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
            self._return(request, indices)

    def crashed(self, piece: Slice, max_attempts: int) -> Suspect | None:
        """The worker died on ``piece``: let its pairs wait again, one by one if it was not their first such worker.

        Returns:
            The pair to blame, if ``piece`` is that one pair and has now ended ``max_attempts`` workers.
        """
        alone_from = max(1, max_attempts - 1)
        for request, indices in piece.parts:
            if request.number not in self.live:
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
            if len(piece) > 1:
                self._return(request, indices, alone=True)
            elif request.number in self.live:
                return Suspect(request, indices[0], 1)
        return None

    def drop(self, request: Request) -> None:
        """Forget ``request``: it is complete, cancelled, expired or failed. Pairs still waiting never go out."""
        if self.live.pop(request.number, None) is None:
            return
        self.waiting_tokens -= request.waiting_tokens
        if request.waiting:
            self._weight -= request.weight
        request.waiting_tokens = 0
        request.todo.clear()
        request.alone.clear()
        if len(self._deadlines) > 2 * len(self.live) + 100:  # entries of the finished, most of them
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.live]
            heapq.heapify(self._deadlines)

    def drop_untouched(self) -> list[Request]:
        """Forget, and return in order of arrival, the requests no pair of which has gone out."""
        untouched = [request for request in self.live.values() if request.slices == 0]
        for request in untouched:
            del self.live[request.number]
            self.waiting_tokens -= request.waiting_tokens
            self._weight -= request.weight
        return untouched

    def expire(self, now: float) -> list[Request]:
        """Forget, and return, the requests whose deadline is at or before ``now``."""
        expired = []
        while (deadline := self.next_deadline()) is not None and deadline <= now:
            request = self.live[heapq.heappop(self._deadlines)[1]]
            self.drop(request)
            expired.append(request)
        return expired

    def next_deadline(self) -> float | None:
        """The earliest deadline of a live request, on the clock its requests use."""
        while self._deadlines and self._deadlines[0][1] not in self.live:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def _push(self, request: Request) -> None:
        finish = request.virtual_time + min(request.waiting_tokens, PIECE_TOKENS) / request.weight
        heapq.heappush(self._order, (finish, request.number))

    def _return(self, request: Request, indices: Sequence[int], *, alone: bool = False) -> None:
        """Let pairs that were out wait again, unless their request is gone."""
        if not indices or request.number not in self.live:
            return
        queued = request.waiting > 0
        if alone:
            request.alone.extend(indices)
        else:
            request.todo.extendleft(reversed(indices))
        cost = sum(request.tokens[i] for i in indices)
        self.waiting_tokens += cost
        request.waiting_tokens += cost
        if not queued:
            self._weight += request.weight
            self._push(request)
