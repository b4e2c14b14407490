"""The queue: which pairs a worker gets next. Pure: no threads, no clock, no processes.

Fairness has two levels: first between callers, then between the requests of one caller.

Between callers it is start-time fair queueing (Goyal, Vin and Cheng, 1996, also for its hierarchy). Each caller has a
start: the tokens it was given, on one scale for all. Next is the caller with the least start, and its turn moves its
start on by the tokens it takes. A turn is what one slice takes from one request. The scale's present is the start of
the last turn, and a part of the turn itself: its tokens, shared among the callers that wait and one more. (Without
that part, callers who come once, each under a new name, could keep an old one waiting for ever.) A caller with nothing
waiting begins again at the present, or at its own start if that is later: it may have been given more than its share.
So the starts of callers that wait, and the present, are never further apart than one turn, and a newcomer waits for a
turn or two of each other caller, however many requests these have.

Between the requests of a caller it is weighted fair queueing (Demers, Keshav and Shenker, 1989). The caller's virtual
time is what each of its requests would have been given by now, per unit of weight, had its share been divided exactly.
A new request starts at its present; what is taken from a request moves the request on by its tokens over its weight;
and next is whichever would be first to finish its next share. So a request of 5,000 documents does not hold up one of
10 that comes after it. And since virtual time goes on with every turn, whoever waits is overtaken by later requests for
a bounded amount of work only: neither a stream of small ones nor any priority starves anybody.

A turn takes O(log n) steps, of n callers and n requests.

Equal pairs, of one request or of several, are one pair, wanted more than once. It waits in all the requests that want
it and goes out at the first turn of any of them, which alone is charged for it, as its caller is; its score, or the
blame for what it does to workers, is for all. So no request waits for another's turn, and what becomes of one
(cancelled, expired, failed) is nothing to the others: a pair is given up when nobody is left who wants it.

A pair is in exactly one place: waiting, in each request that wants it; out in one slice; scored; or dropped with the
last such request.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass

from mp_rerank._pairs import PLAIN, Pair, PairOptions, Reading, Readings, Score
from mp_rerank._scheduling.request import PairState, PendingPair, Request
from mp_rerank.results import PoolStats, Scores

__all__ = ["RequestQueue", "Slice", "Suspect"]

# At most so many tokens of a request count for its place in the order: of two requests of one age, the smaller goes
# first.
TURN_TOKENS = 1024

WAITING, ALONE, OUT, SCORED = PairState.WAITING, PairState.ALONE, PairState.OUT, PairState.SCORED


@dataclass(frozen=True, eq=False)
class Slice:
    """What one worker gets at a time: pairs taken from one request or from several."""

    parts: Sequence[tuple[Request, Sequence[PendingPair]]]
    tokens: int

    @property
    def pending(self) -> list[PendingPair]:
        """The pairs, in the order their scores are expected."""
        return [pair for _, pairs in self.parts for pair in pairs]

    @property
    def pairs(self) -> list[Pair]:
        """Their texts, in the same order."""
        return [pair.texts for _, pairs in self.parts for pair in pairs]

    @property
    def options(self) -> list[PairOptions] | None:
        """How each of them is read; ``None``: all plainly."""
        if all(request.options is PLAIN for request, _ in self.parts):
            return None
        return [pair.options for _, pairs in self.parts for pair in pairs]

    def __len__(self) -> int:
        return sum(len(pairs) for _, pairs in self.parts)


@dataclass(frozen=True)
class Suspect:
    """A request with a pair that was alone with a worker when something went wrong, as often as is allowed."""

    request: Request
    index: int
    attempts: int


class _Caller:
    """The requests of one caller that wait, in the order of their turns.

    Attributes:
        name: as its requests have it.
        start: the tokens it was given, on the queue's scale; it has its turn before those with a later start.
        place: the number of its entry in the queue's order of callers; ``None``: it has none.
        live: how many live requests it has.
        weight: of its requests with pairs waiting; weights are powers of two, so the sum stays exact.
        virtual_time: what its requests were given, per unit of weight.
        order: a heap of its requests' numbers; those that do not wait any more are passed over.
    """

    __slots__ = ("live", "name", "order", "place", "start", "virtual_time", "weight")

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = 0.0
        self.place: int | None = None
        self.live = 0
        self.weight = 0.0
        self.virtual_time = 0.0
        self.order: list[tuple[float, int]] = []

    def push(self, request: Request) -> None:
        """Let ``request`` stand in the order of service, once, whatever others have done to its place."""
        if not request.queued:
            request.queued = True
            finish = request.virtual_time + min(request.waiting_tokens, TURN_TOKENS) / request.weight
            heapq.heappush(self.order, (finish, request.number))

    def first(self, live: Mapping[int, Request]) -> Request:
        """The request whose turn it is; there is one while ``weight`` is not 0."""
        while True:
            request = live.get(self.order[0][1])
            if request is not None and request.waiting:
                return request
            heapq.heappop(self.order)
            if request is not None:
                request.queued = False


class RequestQueue:
    """The live requests of one model, and the order they are served in.

    Args:
        coalesce: whether equal pairs that are pending at once are one.
        kept: scores of pairs, and their readings, by their keys; what is in it is not scored again, and what is scored
            is put into it.
        counts: counters to count in what is not scored for that.

    Attributes:
        live: requests neither resolved nor dropped, whether their pairs are waiting or out.
        waiting_tokens: estimated tokens of all pairs not out in a slice.
    """

    def __init__(
        self,
        *,
        coalesce: bool = True,
        kept: MutableMapping[Hashable, tuple[Score, Reading | None]] | None = None,
        counts: PoolStats | None = None,
    ) -> None:
        self.live: dict[int, Request] = {}
        self.waiting_tokens = 0
        self._coalesce = coalesce
        self._kept = kept
        self._counts = PoolStats() if counts is None else counts
        self._pending: dict[Hashable, PendingPair] = {}  # those that equal ones may join: neither scored nor dropped
        self._callers: dict[str, _Caller] = {}  # those with live requests, and those that were given more than others
        self._order: list[tuple[float, int, _Caller]] = []  # a heap; entries that are not a caller's place are stale
        self._places = itertools.count()
        self._waiting_callers = 0
        self._present = 0.0  # where a newcomer's start is, at least
        self._latest = 0.0  # the latest start of any caller
        self._ahead: list[tuple[float, str]] = []  # a heap of callers without live requests, whose start is to come
        # A heap of numbers, so that an entry waiting to be passed over keeps no finished request in memory.
        self._deadlines: list[tuple[float, int]] = []

    def __repr__(self) -> str:
        return f"<RequestQueue: {len(self.live)} live, {self.waiting_tokens} tokens waiting>"

    def add(self, request: Request) -> bool:
        """Let ``request`` wait for its turn; it may have waited, untouched, in another queue.

        Returns:
            Whether there is anything to wait for. If all its scores were kept it has them, and is not live.
        """
        request.enter()
        new_tokens = 0
        options = request.options
        for key, texts, tokens in zip(request.keys, request.pairs, request.tokens, strict=True):
            pair = self._pending.get(key)
            if pair is not None:
                self._join(request, pair)
            else:
                pair = PendingPair(key, texts, tokens, options)
                if self._kept is None or not self._recall(request, pair):
                    pair.wanted_by.append(request)
                    request.waiting += 1
                    new_tokens += tokens
                    if self._coalesce:
                        self._pending[key] = pair
            request.wanted.append(pair)
        request.waiting_tokens += new_tokens
        self.waiting_tokens += new_tokens
        if request.missing < len(request.pairs):
            request.tell(pair for pair in request.wanted if pair.state is SCORED)  # kept ones: each is there once
        if not request.missing:
            return False
        request.todo.extend([request.wanted[i] for i in request.order])
        self.live[request.number] = request
        caller = self._caller(request)
        caller.live += 1
        request.virtual_time = caller.virtual_time
        if request.waiting:
            self._begin_to_wait(request)
            caller.push(request)
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.number))
        return True

    def take(self, budget: int) -> Slice | None:
        """The next slice: of at most ``budget`` tokens, or of a single pair; ``None`` if nothing waits.

        It holds pairs of the request whose turn it is and, if that is all of it, what else comes next and fits whole,
        of this caller or of another: a small request neither waits for a large one's pairs in its slice nor is split to
        fill another's.
        """
        parts: list[tuple[Request, list[PendingPair]]] = []
        tokens = 0
        while self._order and tokens < budget:
            start, place, caller = self._order[0]
            if place != caller.place or not caller.weight:
                heapq.heappop(self._order)
                if place == caller.place:
                    caller.place = None
                continue
            request = caller.first(self.live)
            suspect = _suspect(request.alone)
            if parts and (suspect is not None or tokens + request.waiting_tokens > budget):
                break
            heapq.heappop(self._order)
            heapq.heappop(caller.order)
            request.queued = False
            if suspect is not None:
                pairs, cost = [suspect], suspect.tokens
                suspect.state = OUT
                budget = 0
            else:
                pairs, cost = _take_waiting(request.todo, budget - tokens)
            caller.virtual_time += cost / caller.weight
            self._move_on(start, cost)
            self._sent(pairs)
            parts.append((request, pairs))
            tokens += cost
            request.slices += 1
            request.virtual_time += cost / request.weight
            if request.waiting:
                caller.push(request)
            caller.start = start + cost
            caller.place = None
            if caller.weight:
                self._stand(caller)
        self._forget_callers()
        return Slice(parts, tokens) if parts else None

    def fill(
        self, slice_: Slice, scores: Scores, readings: Readings | None = None, refused: Collection[int] = ()
    ) -> list[Request]:
        """Take the scores of ``slice_``, and what was read of its pairs.

        Args:
            refused: which of its pairs have no score, by their places: see ``refuse``.

        Returns:
            The requests that now have all of their scores, no longer live.
        """
        complete = []
        told: dict[Request, list[PendingPair]] = {}
        spared = 0
        for i, (pair, score) in enumerate(zip(slice_.pending, scores.tolist(), strict=True)):
            if i in refused:
                continue
            pair.score = score
            pair.reading = None if readings is None else readings.of(i)
            pair.state = SCORED
            self._pending.pop(pair.key, None)
            if self._kept is not None:
                self._kept[pair.key] = score, pair.reading
            spared -= bool(pair.wanted_by)
            for request in pair.wanted_by:
                times = request.repeats.get(pair, 1)
                spared += times
                request.missing -= times
                if not request.missing:
                    complete.append(request)
                if request.on_scores is not None:
                    told.setdefault(request, []).append(pair)
            pair.wanted_by.clear()
        self._counts.coalesced_pairs += spared
        for request, pairs in told.items():
            request.tell(pairs)
        for request in complete:
            self.drop(request)
        return complete

    def put_back(self, slice_: Slice) -> None:
        """Let the pairs of ``slice_`` wait again: it never ran, through no fault of theirs."""
        self._return(slice_.pending)

    def crashed(self, slice_: Slice, max_attempts: int) -> list[Suspect]:
        """The worker died on ``slice_``: let its pairs wait again, one by one if it was not their first such worker.

        Returns:
            If ``slice_`` is one pair and has now ended ``max_attempts`` workers: the requests to fail for it, no longer
            live.
        """
        pairs = slice_.pending
        for pair in pairs:
            pair.attempts += 1
        if len(pairs) == 1 and pairs[0].attempts >= max_attempts:
            return self._blame(pairs[0], pairs[0].attempts)
        alone_from = max(1, max_attempts - 1)
        self._return([pair for pair in pairs if pair.attempts < alone_from])
        self._return([pair for pair in pairs if pair.attempts >= alone_from], ALONE)
        return []

    def raised(self, slice_: Slice) -> list[Suspect]:
        """The model raised on ``slice_``: let its pairs wait again, one by one.

        Returns:
            If ``slice_`` is one pair: the requests to fail for it, no longer live.
        """
        pairs = slice_.pending
        if len(pairs) == 1:
            return self._blame(pairs[0], 1)
        self._return(pairs, ALONE)
        return []

    def refuse(self, slice_: Slice, places: Iterable[int]) -> list[Suspect]:
        """Give up the pairs of ``slice_`` at ``places``: they came back, and have no score.

        Returns:
            The requests to fail for it, no longer live.
        """
        pending = slice_.pending
        return [suspect for i in places for suspect in self._blame(pending[i], 1)]

    def drop(self, request: Request) -> None:
        """Forget ``request``: it is complete, cancelled, expired or failed. Pairs only it wanted never go out."""
        if self.live.pop(request.number, None) is None:
            return
        caller = self._caller(request)
        caller.live -= 1
        if request.waiting:
            self._end_to_wait(request)
        if request.missing:
            for pair in dict.fromkeys(request.wanted):
                if pair.state is not SCORED:
                    pair.wanted_by.remove(request)
                    if not pair.wanted_by and pair.state is not OUT:
                        self._forget(pair)
        request.waiting = request.waiting_tokens = 0
        request.todo.clear()
        request.alone.clear()
        if not caller.live:
            caller.order.clear()
            heapq.heappush(self._ahead, (caller.start, caller.name))
            self._forget_callers()
        if len(self._deadlines) > 2 * len(self.live) + 100:  # entries of the finished, most of them
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.live]
            heapq.heapify(self._deadlines)

    def drop_untouched(self) -> list[Request]:
        """Forget, and return in order of arrival, the requests that have sent nothing out and have no score yet."""
        untouched = [r for r in self.live.values() if r.slices == 0 and r.missing == len(r.pairs)]
        for request in untouched:
            self.drop(request)
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

    # Callers.

    def _caller(self, request: Request) -> _Caller:
        """Whose request it is."""
        caller = self._callers.get(request.caller)
        if caller is None:
            caller = self._callers[request.caller] = _Caller(request.caller)
        return caller

    def _begin_to_wait(self, request: Request) -> None:
        """Count ``request``, which has pairs waiting now and had none, as its caller's."""
        caller = self._caller(request)
        if not caller.weight:
            caller.start = max(caller.start, self._present)
            self._waiting_callers += 1
            self._stand(caller)
        caller.weight += request.weight

    def _end_to_wait(self, request: Request) -> None:
        """Count ``request``, which has no pairs waiting any more, as its caller's no longer."""
        caller = self._caller(request)
        caller.weight -= request.weight
        self._waiting_callers -= not caller.weight

    def _move_on(self, start: float, cost: int) -> None:
        """Let time go on by a turn of the caller at ``start``, which is the least, of ``cost`` tokens."""
        present = max(self._present, start)
        self._present = max(present, min(start + cost, present + cost / (self._waiting_callers + 1)))
        self._latest = max(self._latest, start + cost)

    def _stand(self, caller: _Caller) -> None:
        """Let ``caller`` stand in the order of callers at its start; its entry there, if it has one, is stale now."""
        caller.place = next(self._places)
        heapq.heappush(self._order, (caller.start, caller.place, caller))

    def _forget_callers(self) -> None:
        """Forget those without live requests, but for those that were given more than others who still wait."""
        if not self.waiting_tokens:
            self._present = self._latest  # nobody waits: all begin anew as equals
        while self._ahead and self._ahead[0][0] <= self._present:
            _, name = heapq.heappop(self._ahead)
            caller = self._callers.get(name)
            if caller is not None and not caller.live and caller.start <= self._present:
                del self._callers[name]
        if len(self._order) > 2 * len(self._callers) + 100:  # stale entries, most of them
            self._order = [entry for entry in self._order if entry[1] == entry[2].place and entry[2].weight]
            heapq.heapify(self._order)

    # Pairs.

    def _recall(self, request: Request, pair: PendingPair) -> bool:
        """Give ``pair``, which is only ``request``'s, its score if that was kept; whether it was."""
        assert self._kept is not None
        kept = self._kept.get(pair.key)
        if kept is None:
            return False
        pair.score, pair.reading = kept
        pair.state = SCORED
        request.missing -= 1
        self._counts.cached_pairs += 1
        return True

    def _join(self, request: Request, pair: PendingPair) -> None:
        """Let ``pair``, which is pending, be ``request``'s too, or once more."""
        if pair.wanted_by and pair.wanted_by[-1] is request:
            request.repeats[pair] = request.repeats.get(pair, 1) + 1
            return
        pair.wanted_by.append(request)
        if pair.state is not OUT:
            request.waiting += 1
            request.waiting_tokens += pair.tokens
        if pair.state is ALONE:
            request.alone.append(pair)

    def _sent(self, pairs: Sequence[PendingPair]) -> None:
        """Take ``pairs``, which are out now, from what waits."""
        for pair in pairs:
            self.waiting_tokens -= pair.tokens
            for request in pair.wanted_by:
                request.waiting -= 1
                request.waiting_tokens -= pair.tokens
                if not request.waiting:
                    self._end_to_wait(request)

    def _return(self, pairs: Sequence[PendingPair], state: PairState = WAITING) -> None:
        """Let ``pairs``, which were out, wait again, unless nobody wants them any more."""
        returned: dict[Request, None] = {}
        for pair in pairs if state is ALONE else reversed(pairs):
            pair.state = state
            self.waiting_tokens += pair.tokens
            if not pair.wanted_by:
                self._forget(pair)
            for request in pair.wanted_by:
                if state is ALONE:
                    request.alone.append(pair)
                else:
                    request.todo.appendleft(pair)
                if not request.waiting:
                    self._begin_to_wait(request)
                request.waiting += 1
                request.waiting_tokens += pair.tokens
                returned[request] = None
        for request in returned:
            self._caller(request).push(request)

    def _blame(self, pair: PendingPair, attempts: int) -> list[Suspect]:
        """Forget ``pair``, which is out, and the requests that want it."""
        suspects = [Suspect(request, request.wanted.index(pair), attempts) for request in pair.wanted_by]
        for suspect in suspects:
            self.drop(suspect.request)
        self._pending.pop(pair.key, None)
        return suspects

    def _forget(self, pair: PendingPair) -> None:
        """Give up ``pair``, which waits and is wanted no more."""
        self.waiting_tokens -= pair.tokens
        self._pending.pop(pair.key, None)


def _take_waiting(todo: deque[PendingPair], budget: int) -> tuple[list[PendingPair], int]:
    """The first pairs of ``todo`` that wait, now out: at least one, and no more than ``budget``; and their tokens."""
    pairs: list[PendingPair] = []
    cost = 0
    while todo:
        pair = todo[0]
        if pair.state is WAITING:
            if pairs and cost + pair.tokens > budget:
                break
            pair.state = OUT
            pairs.append(pair)
            cost += pair.tokens
        todo.popleft()  # what does not wait went out for another request, or is no longer for this line
    return pairs, cost


def _suspect(alone: deque[PendingPair]) -> PendingPair | None:
    """The first of ``alone`` that waits; those before it went out for another request, and leave."""
    while alone and alone[0].state is not ALONE:
        alone.popleft()
    return alone[0] if alone else None
