"""The queue by itself: whatever happens to a pair, it is in one place; and nobody waits for ever."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import Counter

import numpy as np
import pytest
from cachetools import LRUCache
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mp_rerank._pairs import digests
from mp_rerank._scheduling.queue import TURN_TOKENS, RequestQueue, Slice, Suspect
from mp_rerank._scheduling.request import DEFAULT_CALLER, PairState, PendingPair, Request
from mp_rerank.results import PoolStats, Scores

MAX_ATTEMPTS = 3
SLICE = 900  # tokens
MAX_BUDGET = 1500

lengths = st.integers(1, 300)
priorities = st.integers(-8, 8)
documents = st.lists(st.integers(0, 25), min_size=1, max_size=20)  # few enough that many are equal
callers = st.sampled_from(["a", "b", "c"])

_numbers = itertools.count()


def make_request(
    tokens: list[int], priority: int = 0, deadline: float | None = None, caller: str = DEFAULT_CALLER
) -> Request:
    """A request whose pairs are no other's."""
    pairs = [("query", f"document {next(_numbers)}") for _ in tokens]
    return Request(pairs, tokens, lambda scores, *_: scores, caller=caller, priority=priority, deadline=deadline)


def make_alike(
    documents: list[int], priority: int = 0, deadline: float | None = None, caller: str = DEFAULT_CALLER
) -> Request:
    """A request whose pairs may be others' too: each is known by its number."""
    pairs = [("query", str(document)) for document in documents]
    tokens = [document * 37 % 300 + 1 for document in documents]
    return Request(pairs, tokens, lambda scores, *_: scores, caller=caller, priority=priority, deadline=deadline)


def scores_of(slice_: Slice, model: int = 0) -> Scores:
    """``model``'s: of a document with a number, the number and a thousand for each model."""
    return np.array([1000 * model + int(document.split()[-1]) for _, document in slice_.pairs], dtype=np.float32)


def numbers_of(slice_: Slice) -> list[int]:
    return [int(document) for _, document in slice_.pairs]


class QueueMachine(RuleBasedStateMachine):
    """Any interleaving of what can happen to requests that hold equal pairs, of several callers, under two models, one
    after the other.

    A pair is waiting in all live requests that want it, or out in one slice, or scored: never two, never none. Callers
    that wait are never further apart than one turn.
    """

    @initialize(coalesce=st.booleans(), kept=st.sampled_from([0, 0, 3, 100]))
    def start(self, coalesce: bool, kept: int) -> None:
        self.coalesce = coalesce
        self.counts = PoolStats()
        self.queue, self.next_queue = (
            RequestQueue(coalesce=coalesce, kept=LRUCache(kept) if kept else None, counts=self.counts) for _ in range(2)
        )
        self.reloaded = False
        self.now = 0.0
        self.live: dict[int, Request] = {}
        self.out: list[tuple[RequestQueue, Slice]] = []
        self.scored_pairs = self.answered_pairs = 0

    @rule(documents=documents, priority=priorities, patience=st.none() | st.integers(0, 10), caller=callers)
    def add(self, documents: list[int], priority: int, patience: int | None, caller: str) -> None:
        request = make_alike(documents, priority, None if patience is None else self.now + patience, caller)
        if (self.next_queue if self.reloaded else self.queue).add(request):
            self.live[request.number] = request
        else:
            self.conclude(request, int(self.reloaded))

    @rule(budget=st.integers(1, MAX_BUDGET), which=st.booleans())
    def take(self, budget: int, which: bool) -> None:
        queue = self.next_queue if which else self.queue
        waiting = queue.waiting_tokens
        slice_ = queue.take(budget)
        assert (slice_ is None) == (waiting == 0)
        if slice_ is not None:
            assert len(slice_) >= 1
            assert slice_.tokens == sum(pair.tokens for pair in slice_.pending)
            assert slice_.tokens <= budget or len(slice_) == 1
            assert all(request.number in self.live for request, _ in slice_.parts)
            self.out.append((queue, slice_))

    def ending(self, chosen: int) -> tuple[RequestQueue, Slice]:
        return self.out.pop(chosen % len(self.out))

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99))
    def fill(self, chosen: int) -> None:
        queue, slice_ = self.ending(chosen)
        model = int(queue is self.next_queue)
        self.scored_pairs += sum(bool(pair.wanted_by) for pair in slice_.pending)
        for request in queue.fill(slice_, scores_of(slice_, model)):
            del self.live[request.number]
            self.conclude(request, model)

    def conclude(self, request: Request, model: int) -> None:
        request.resolve()
        assert request.future.result(0).tolist() == [1000 * model + int(document) for _, document in request.pairs]

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99), raised=st.booleans())
    def crash(self, chosen: int, raised: bool) -> None:
        queue, slice_ = self.ending(chosen)
        wanting = [request for request in self.live.values() if request.number in queue.live]
        suspects = queue.raised(slice_) if raised else queue.crashed(slice_, MAX_ATTEMPTS)
        if not suspects:
            return
        assert len(slice_) == 1
        if self.coalesce:  # else a request may hold an equal one that is none of this one's
            wanting = [request for request in wanting if slice_.pairs[0] in request.pairs]
            assert sorted(suspect.request.number for suspect in suspects) == [request.number for request in wanting]
        for suspect in suspects:
            assert suspect.request.pairs[suspect.index] == slice_.pairs[0]
            assert raised or suspect.attempts == MAX_ATTEMPTS
            del self.live[suspect.request.number]

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99))
    def put_back(self, chosen: int) -> None:
        queue, slice_ = self.ending(chosen)
        queue.put_back(slice_)

    @precondition(lambda self: self.live)
    @rule(chosen=st.integers(0, 99))
    def cancel(self, chosen: int) -> None:
        request = list(self.live.values())[chosen % len(self.live)]
        for queue in (self.queue, self.next_queue):
            queue.drop(request)
        del self.live[request.number]

    @rule(seconds=st.integers(0, 5))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        due = {n for n, r in self.live.items() if r.deadline is not None and r.deadline <= self.now}
        expired = [*self.queue.expire(self.now), *self.next_queue.expire(self.now)]
        assert {request.number for request in expired} == due
        assert len(expired) == len(due)
        for request in expired:
            del self.live[request.number]
            request.finish = lambda scores, scored, readings: (scores, scored)
            had = request.missing
            request.resolve()
            scores, scored = request.future.result(0)
            assert np.isnan(scores).tolist() == (~scored).tolist()
            assert (~scored).sum() == had
        deadlines = [request.deadline for request in self.live.values() if request.deadline is not None]
        nexts = [d for d in (self.queue.next_deadline(), self.next_queue.next_deadline()) if d is not None]
        assert min(nexts, default=None) == min(deadlines, default=None)

    @precondition(lambda self: not self.reloaded)
    @rule()
    def reload(self) -> None:
        self.reloaded = True
        for request in self.queue.drop_untouched():
            if not self.next_queue.add(request):
                del self.live[request.number]
                self.conclude(request, 1)

    @invariant()
    def every_pair_is_in_one_place(self) -> None:
        assert {*self.queue.live, *self.next_queue.live} == set(self.live)
        for model, queue in enumerate((self.queue, self.next_queue)):
            out = Counter(pair for source, slice_ in self.out if source is queue for pair in slice_.pending)
            found: dict[PendingPair, None] = {}
            for request in queue.live.values():
                distinct = dict.fromkeys(request.wanted)
                found.update(distinct)
                assert [pair.texts for pair in request.wanted] == list(request.pairs)
                assert request.missing == sum(pair.state is not PairState.SCORED for pair in request.wanted)
                assert request.missing
                waiting = [pair for pair in distinct if pair.state in (PairState.WAITING, PairState.ALONE)]
                assert request.waiting == len(waiting)
                assert request.waiting_tokens == sum(pair.tokens for pair in waiting)
                for pair in distinct:
                    assert out[pair] == (pair.state is PairState.OUT)
                    if pair.state is PairState.WAITING:
                        assert pair in request.todo
                    elif pair.state is PairState.ALONE:
                        assert pair in request.alone
                    elif pair.state is PairState.SCORED:
                        assert pair.score == 1000 * model + int(pair.texts[1])
                    assert pair.wanted_by.count(request) == (pair.state is not PairState.SCORED)
                order = [number for _, number in queue._callers[request.caller].order]
                assert order.count(request.number) == request.queued
                assert request.queued or not request.waiting
            for pair in (*found, *out):
                assert all(request.number in queue.live for request in pair.wanted_by)
            waiting = [pair for pair in found if pair.state in (PairState.WAITING, PairState.ALONE)]
            assert queue.waiting_tokens == sum(pair.tokens for pair in waiting)
            if self.coalesce:
                pending = {pair for pair in found if pair.state is not PairState.SCORED} | set(out)
                assert {*queue._pending.values()} == pending
                assert max(Counter(pair.texts for pair in pending).values(), default=1) == 1
            else:
                assert not queue._pending
                assert all(len(pair.wanted_by) <= 1 for pair in found)

    @invariant()
    def callers_are_known_while_they_matter(self) -> None:
        for queue in (self.queue, self.next_queue):
            live = Counter(request.caller for request in queue.live.values())
            assert live.keys() <= queue._callers.keys()
            for name, caller in queue._callers.items():
                waiting = [request for request in queue.live.values() if request.caller == name and request.waiting]
                assert (caller.name, caller.live) == (name, live[name])
                assert caller.weight == sum(request.weight for request in waiting)
                assert caller.live or caller.start > queue._present
                entries = [entry for entry in queue._order if entry[1:] == (caller.place, caller)]
                if waiting:
                    assert entries == [(caller.start, caller.place, caller)]
            starts = [caller.start for caller in queue._callers.values() if caller.weight]
            assert queue._waiting_callers == len(starts)
            if starts:
                assert max(*starts, queue._present) - min(*starts, queue._present) <= MAX_BUDGET

    def teardown(self) -> None:
        """Left alone, every request that is left comes to its end."""
        if not hasattr(self, "queue"):
            return
        while self.out:
            self.fill(0)
        for which in (False, True):
            while (self.next_queue if which else self.queue).waiting_tokens:
                self.take(SLICE, which)
                self.fill(0)
        assert not self.live
        assert not self.queue.live
        assert not self.next_queue.live


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_interleaving_conserves_every_pair = QueueMachine.TestCase


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(documents, min_size=1, max_size=8),
    poison=st.sets(st.integers(0, 25), max_size=5),
    max_attempts=st.integers(1, 4),
)
def test_poison_is_found_and_the_innocent_are_scored(
    sizes: list[list[int]], poison: set[int], max_attempts: int
) -> None:
    """Those who hold it fail for it, together; nobody else."""
    queue = RequestQueue()
    requests = [make_alike(documents) for documents in sizes]
    for request in requests:
        queue.add(request)
    deaths, failed, complete = 0, set(), set()
    while (slice_ := queue.take(SLICE)) is not None:
        if poison.isdisjoint(numbers_of(slice_)):
            complete |= {request.number for request in queue.fill(slice_, scores_of(slice_))}
            continue
        deaths += 1
        for suspect in queue.crashed(slice_, max_attempts):
            assert int(suspect.request.pairs[suspect.index][1]) in poison
            failed.add(suspect.request.number)
    assert failed == {
        r.number for r, documents in zip(requests, sizes, strict=True) if not poison.isdisjoint(documents)
    }
    assert complete == {request.number for request in requests} - failed
    # Of one request the first poison found is enough; with max_attempts=1 it first has to be alone.
    assert deaths <= max(2, max_attempts) * len(poison & {document for documents in sizes for document in documents})


def test_what_comes_to_a_suspect_is_scored_alone_with_it_too() -> None:
    queue = RequestQueue()
    queue.add(make_alike([1, 2]))
    slice_ = queue.take(SLICE)
    assert slice_ is not None
    queue.raised(slice_)
    late = make_alike([2, 3, 4])
    queue.add(late)
    sizes = []
    while (slice_ := queue.take(SLICE)) is not None:
        sizes.append(sorted(numbers_of(slice_)))
        queue.fill(slice_, scores_of(slice_))
    assert sorted(sizes) == [[1], [2], [3, 4]]
    assert not queue.live


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(documents, min_size=1, max_size=10), budget=st.integers(1, 1500), kept=st.sampled_from([0, 5, 100])
)
def test_equal_pairs_are_scored_once_and_every_pair_is_accounted_for(
    sizes: list[list[int]], budget: int, kept: int
) -> None:
    counts = PoolStats()
    queue = RequestQueue(kept=LRUCache(kept) if kept else None, counts=counts)
    scored: Counter[int] = Counter()
    for again in range(2):
        for documents in sizes:
            request = make_alike(documents)
            if not queue.add(request):
                request.resolve()
                assert request.future.result(0).tolist() == documents
        while (slice_ := queue.take(budget)) is not None:
            scored.update(numbers_of(slice_))
            queue.fill(slice_, scores_of(slice_))
        assert not queue.live
        if not again:
            assert set(scored.values()) == {1}  # all were pending at once
    distinct = len(scored)
    if kept == 100:
        assert set(scored.values()) == {1}
    elif not kept:
        assert set(scored.values()) == {2}
        assert counts.cached_pairs == 0
    else:
        assert scored.total() >= 2 * distinct - kept  # what was pushed out is scored again
    asked = 2 * sum(len(documents) for documents in sizes)
    assert scored.total() + counts.coalesced_pairs + counts.cached_pairs == asked


def test_of_the_scores_kept_those_asked_for_last_stay() -> None:
    counts = PoolStats()
    queue = RequestQueue(kept=LRUCache(2), counts=counts)

    def ask(document: int) -> bool:
        """Whether it had to be scored."""
        queue.add(make_alike([document]))
        slice_ = queue.take(SLICE)
        if slice_ is not None:
            queue.fill(slice_, scores_of(slice_))
        return slice_ is not None

    assert [ask(n) for n in (1, 2, 1, 3, 1, 2)] == [True, True, False, True, False, True]
    assert counts.cached_pairs == 2


def test_nobody_waits_for_the_turn_of_another_who_wants_the_same() -> None:
    """An urgent request's pairs are the last of a large one's, and of one of low priority."""
    counts = PoolStats()
    queue = RequestQueue(counts=counts)
    large = make_alike(list(range(5000)))
    large.order.reverse()
    queue.add(large)
    idle = make_alike(list(range(5000)), -8)
    queue.add(idle)
    for _ in range(20):
        queue.take(SLICE)
    waiting = [int(pair.texts[1]) for pair in large.todo if pair.state is PairState.WAITING and pair.tokens < 90]
    small = make_alike(waiting[-10:])
    queue.add(small)
    assert small.waiting == 10
    assert served_before(queue, small) == 0
    assert not queue.live.keys() & {small.number}
    assert counts.coalesced_pairs == 20  # both others have them for nothing


def test_the_taker_s_end_is_not_the_pair_s() -> None:
    """It was taken from one request; that one goes, while it is out or waits again; the other gets its score."""
    for ends in ("while it is out", "once it is back"):
        queue = RequestQueue()
        taker, other = make_alike([1, 2]), make_alike([1, 2])
        queue.add(taker)
        queue.add(other)
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        assert [request for request, _ in slice_.parts] == [taker]
        if ends == "while it is out":
            queue.drop(taker)
            assert queue.crashed(slice_, MAX_ATTEMPTS) == []
        else:
            assert queue.crashed(slice_, MAX_ATTEMPTS) == []
            queue.drop(taker)
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        assert [request for request, _ in slice_.parts] == [other]
        assert queue.fill(slice_, scores_of(slice_)) == [other]


def test_one_who_comes_while_nobody_else_waits_for_what_is_out_gets_it() -> None:
    queue = RequestQueue()
    gone, late = make_alike([1]), make_alike([1])
    queue.add(gone)
    slice_ = queue.take(SLICE)
    assert slice_ is not None
    queue.drop(gone)
    queue.add(late)
    assert queue.take(SLICE) is None
    assert queue.fill(slice_, scores_of(slice_)) == [late]
    queue.add(make_alike([1]))
    assert queue.take(SLICE) is not None  # what has its score is not joined any more


def test_deaths_are_counted_by_pair_not_by_request() -> None:
    """Whoever holds a poison that another request has been failed for twice meets the third death, not three more."""
    queue = RequestQueue()
    first, second = make_alike([1]), make_alike([1, 1, 2])
    queue.add(first)
    queue.add(second)
    for _ in range(2):
        slice_ = queue.take(1)
        assert slice_ is not None
        assert queue.crashed(slice_, MAX_ATTEMPTS) == []
        queue.drop(first)
    while (slice_ := queue.take(1)) is not None:
        if numbers_of(slice_) == [2]:
            queue.fill(slice_, scores_of(slice_))
        else:
            assert queue.crashed(slice_, MAX_ATTEMPTS) == [Suspect(second, 0, 3)]
    assert not queue.live


def test_what_has_shared_a_score_is_not_kept_by_one_who_keeps_a_future() -> None:
    queue = RequestQueue()
    kept, other, gone = make_alike([1, 2]), make_alike([1, 2, 3]), make_alike([1, 3])
    futures = [kept.future, gone.future]
    for request in (kept, other, gone):
        request.future.add_internal_callback(lambda _, request=request: None)  # as the dispatcher does
        queue.add(request)
    queue.drop(gone)
    gone.cancel()
    while (slice_ := queue.take(SLICE)) is not None:
        for request in queue.fill(slice_, scores_of(slice_)):
            request.resolve()
    reference = weakref.ref(other)
    del request, other, slice_
    gc.collect()
    assert reference() is None
    assert futures[0].result(0).tolist() == [1, 2]


texts = st.text(max_size=3)


@given(pairs=st.lists(st.tuples(texts, texts), max_size=10))
def test_digests_are_equal_where_pairs_are(pairs: list[tuple[str, str]]) -> None:
    found = digests([*pairs, ("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""), ("\ud800", "\ud801")])
    assert len(set(found)) == len({*pairs, ("ab", "c"), ("a", "bc"), ("", "abc"), ("abc", ""), ("\ud800", "\ud801")})
    assert digests(pairs) == found[: len(pairs)]
    assert {len(digest) for digest in found} == {16}


def test_pairs_of_a_slice_that_killed_twice_go_out_one_by_one() -> None:
    queue = RequestQueue()
    queue.add(make_request([10] * 5))
    for _ in range(2):
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        assert len(slice_) == 5
        assert queue.crashed(slice_, MAX_ATTEMPTS) == []
    other = make_request([10] * 5)
    queue.add(other)
    sizes = []
    while (slice_ := queue.take(SLICE)) is not None:
        sizes.append(len(slice_))
        queue.fill(slice_, scores_of(slice_))
    assert sorted(sizes) == [1, 1, 1, 1, 1, 5]


def test_a_slice_is_one_request_s_piece_or_several_whole_requests() -> None:
    queue = RequestQueue()
    large = make_request([100] * 50)
    queue.add(large)
    small = [make_request([50] * 4) for _ in range(6)]
    for request in small:
        queue.add(request)
    pieces = []
    while (slice_ := queue.take(SLICE)) is not None:
        pieces.append([(request, len(pairs)) for request, pairs in slice_.parts])
    assert pieces[0] == [(request, 4) for request in small[:4]]
    assert pieces[1] == [(request, 4) for request in small[4:]]
    assert pieces[2:] == [[(large, 9)]] * 5 + [[(large, 5)]]


def served_before(queue: RequestQueue, request: Request, budget: int = SLICE) -> int:
    """Tokens of others taken before, or with, the last pair of ``request``."""
    others = 0
    while request.waiting:
        slice_ = queue.take(budget)
        assert slice_ is not None
        others += sum(pair.tokens for r, pairs in slice_.parts for pair in pairs if r is not request)
        queue.fill(slice_, scores_of(slice_))
    return others


def test_a_small_request_does_not_wait_for_a_large_one() -> None:
    queue = RequestQueue()
    queue.add(make_request([80] * 5000))
    for _ in range(20):
        queue.take(SLICE)
    small = make_request([80] * 10)
    queue.add(small)
    assert served_before(queue, small) == 0


@settings(max_examples=100, deadline=None)
@given(
    backlog=st.lists(st.lists(lengths, min_size=1, max_size=60), max_size=12),
    begun=st.integers(0, 30),
    newcomer=st.lists(lengths, min_size=1, max_size=60),
)
def test_a_newcomer_waits_for_its_share_and_no_more(backlog: list[list[int]], begun: int, newcomer: list[int]) -> None:
    """Among equals, nobody ahead is served much more than the newcomer is large."""
    queue = RequestQueue()
    for tokens in backlog:
        queue.add(make_request(tokens))
    for _ in range(begun):
        queue.take(SLICE)
    request = make_request(newcomer)
    queue.add(request)
    others = served_before(queue, request)
    assert others <= len(backlog) * (sum(newcomer) + TURN_TOKENS + 2 * SLICE)


@settings(max_examples=60, deadline=None)
@given(low=priorities, high=priorities, at_once=st.integers(1, 5), size=st.integers(1, 12), old_size=st.integers(1, 40))
def test_no_endless_stream_starves_anybody(low: int, high: int, at_once: int, size: int, old_size: int) -> None:
    """Requests of whatever priority that never stop coming delay an old one by their share, which has an end."""
    low, high = max(low, -3), min(high, 3)  # further apart it takes longer, not for ever
    queue = RequestQueue()
    old = make_request([50] * old_size, low)
    queue.add(old)
    stream = 0
    newcomers = 0
    shares = 1 + at_once * 2.0 ** (high - low)
    limit = shares * (50 * old_size + TURN_TOKENS + SLICE) + at_once * (50 * size + SLICE)
    while old.waiting:
        while len(queue.live) <= at_once:
            queue.add(make_request([50] * size, high))
            newcomers += 1
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        stream += sum(pair.tokens for r, pairs in slice_.parts for pair in pairs if r is not old)
        queue.fill(slice_, scores_of(slice_))
        assert stream <= limit


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 3])
def test_each_step_of_priority_doubles_the_share(steps: int) -> None:
    queue = RequestQueue()
    one, other = make_request([30] * 20_000), make_request([30] * 20_000, steps)
    queue.add(one)
    queue.add(other)
    taken = {one: 0, other: 0}
    while one.waiting and other.waiting:
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        for request, pairs in slice_.parts:
            taken[request] += len(pairs)
    assert taken[other] / taken[one] == pytest.approx(2.0**steps, rel=0.02)


def test_a_request_of_higher_priority_comes_before_those_that_wait() -> None:
    queue = RequestQueue()
    for _ in range(100):
        queue.add(make_request([80] * 10))
    urgent = make_request([80] * 10, 3)
    queue.add(urgent)
    assert served_before(queue, urgent) == 0


# Callers.


@settings(max_examples=100, deadline=None)
@given(
    backlogs=st.lists(
        st.lists(st.tuples(st.lists(lengths, min_size=1, max_size=20), priorities), min_size=1, max_size=30), max_size=5
    ),
    begun=st.integers(0, 30),
    newcomer=st.lists(lengths, min_size=1, max_size=60),
)
def test_a_newcomer_waits_for_other_callers_not_for_each_of_their_requests(
    backlogs: list[list[tuple[list[int], int]]], begun: int, newcomer: list[int]
) -> None:
    """Each other caller is served no more than the newcomer is large, and two turns: whatever it has waiting."""
    queue = RequestQueue()
    for number, backlog in enumerate(backlogs):
        for tokens, priority in backlog:
            queue.add(make_request(tokens, priority, caller=f"caller {number}"))
    for _ in range(begun):
        queue.take(SLICE)
    request = make_request(newcomer, -8, caller="newcomer")
    queue.add(request)
    others = served_before(queue, request)
    # Whoever is served with the newcomer's last pairs counts too, and these are a slice.
    assert others <= len(backlogs) * (sum(newcomer) + 2 * SLICE) + SLICE


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 20),
    begun=st.integers(0, 40),
    alike=st.booleans(),
    newcomer=st.lists(lengths, min_size=1, max_size=20),
)
def test_500_requests_of_a_caller_delay_another_s_as_one_does(
    size: int, begun: int, alike: bool, newcomer: list[int]
) -> None:
    """But for a slice or two, since turns are cut at slices. The one is as large as each of them, for a newcomer that
    needs no second turn; else it is as large as all of them.
    """

    def delay(requests: int, size: int) -> int:
        queue = RequestQueue()
        for i in range(requests):
            queue.add(make_request([80] * size, i % 5, caller="agent"))
        for _ in range(0 if alike else begun):
            queue.take(SLICE)
        request = make_request(newcomer, caller="newcomer")
        queue.add(request)
        return served_before(queue, request)

    if alike:
        newcomer = newcomer[:3]
        assert delay(500, size) <= delay(1, size) + SLICE
    else:
        assert delay(500, size) <= delay(1, 500 * size) + 2 * SLICE


@pytest.mark.parametrize("priority", [-8, 0, 8])
@pytest.mark.parametrize("requests", [1, 300])
def test_callers_have_equal_shares_however_many_requests_of_whatever_priority_they_have(
    requests: int, priority: int
) -> None:
    queue = RequestQueue()
    for _ in range(requests):
        queue.add(make_request([30] * (30_000 // requests), priority, caller="one"))
    queue.add(make_request([30] * 30_000, caller="other"))
    taken = Counter[str]()
    while max(taken.values(), default=0) < 15_000:
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        for request, pairs in slice_.parts:
            taken[request.caller] += len(pairs)
    assert taken["one"] / taken["other"] == pytest.approx(1.0, rel=0.01)


@pytest.mark.parametrize("steps", [-2, 1, 3])
def test_priorities_act_inside_a_caller(steps: int) -> None:
    queue = RequestQueue()
    plain, urgent = make_request([30] * 20_000, caller="a"), make_request([30] * 20_000, steps, caller="a")
    other = make_request([30] * 20_000, 8, caller="b")
    taken = {plain: 0, urgent: 0, other: 0}
    for request in taken:
        queue.add(request)
    while max(taken.values()) < 15_000:
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        for request, pairs in slice_.parts:
            taken[request] += len(pairs)
    assert taken[urgent] / taken[plain] == pytest.approx(2.0**steps, rel=0.03)
    assert (taken[urgent] + taken[plain]) / taken[other] == pytest.approx(1.0, rel=0.02)


@settings(max_examples=60, deadline=None)
@given(at_once=st.integers(1, 8), size=st.integers(1, 12), old_size=st.integers(1, 40))
def test_no_endless_stream_of_new_callers_starves_anybody(at_once: int, size: int, old_size: int) -> None:
    queue = RequestQueue()
    old = make_request([50] * old_size, -8, caller="old")
    queue.add(old)
    newcomers, stream = 0, 0
    turn = max(SLICE, 50 * size)
    while old.waiting:
        while len(queue.live) <= at_once:
            queue.add(make_request([50] * size, 8, caller=f"newcomer {newcomers}"))
            newcomers += 1
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        stream += sum(pair.tokens for r, pairs in slice_.parts for pair in pairs if r is not old)
        queue.fill(slice_, scores_of(slice_))
        assert stream <= (at_once + 2) * (50 * old_size + 2 * turn)


def test_a_caller_that_comes_and_goes_does_not_get_more_than_its_share() -> None:
    """Its requests come one at a time, each as the one before is done; another's wait all the time."""
    queue = RequestQueue()
    for _ in range(50):
        queue.add(make_request([80] * 100, caller="steady"))
    taken = Counter[str]()
    single = make_request([80] * 10, caller="single")
    queue.add(single)
    for _ in range(200):
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        for request, pairs in slice_.parts:
            taken[request.caller] += sum(pair.tokens for pair in pairs)
        if single in queue.fill(slice_, scores_of(slice_)):
            single = make_request([80] * 10, caller="single")
            queue.add(single)
    assert taken["single"] / taken["steady"] == pytest.approx(1.0, rel=0.1)


def test_a_caller_that_was_idle_is_owed_nothing() -> None:
    """It comes back as a newcomer, and does not get the workers to itself until it has caught up."""
    queue = RequestQueue()
    queue.add(make_request([80], caller="idle"))
    queue.add(make_request([80] * 5000, caller="steady"))
    for _ in range(100):
        queue.take(SLICE)
    queue.add(make_request([80] * 5000, caller="idle"))
    taken = Counter[str]()
    for _ in range(40):
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        for request, pairs in slice_.parts:
            taken[request.caller] += len(pairs)
    assert taken["idle"] / taken["steady"] == pytest.approx(1.0, rel=0.1)


def test_one_caller_s_turn_serves_all_who_want_the_same() -> None:
    """The one whose turn it was is charged for it, and nobody else."""
    queue = RequestQueue()
    taker, other = make_alike([1, 2, 3], caller="taker"), make_alike([1, 2, 3], caller="other")
    queue.add(taker)
    queue.add(other)
    slice_ = queue.take(SLICE)
    assert slice_ is not None
    assert [request for request, _ in slice_.parts] == [taker]
    assert queue.take(SLICE) is None
    own = make_alike([4], caller="other")
    queue.add(own)
    assert queue._callers["taker"].start > 0
    queue.put_back(slice_)
    again = queue.take(1)
    assert again is not None
    assert again.parts[0][0].caller == "other"
    queue.put_back(again)
    while (slice_ := queue.take(SLICE)) is not None:
        queue.fill(slice_, scores_of(slice_))
    assert not queue.live
    for request in (taker, other, own):
        request.resolve()
        assert request.future.result(0).tolist() == [int(document) for _, document in request.pairs]


def test_callers_that_have_left_are_forgotten() -> None:
    queue = RequestQueue()
    steady = make_request([80] * 5000, caller="steady")
    queue.add(steady)
    most = 0
    for i in range(1000):
        queue.add(make_request([80] * 5, caller=f"caller {i}"))
        if i % 3 == 0:
            queue.drop(next(reversed(queue.live.values())))
        slice_ = queue.take(SLICE)
        assert slice_ is not None
        queue.fill(slice_, scores_of(slice_))
        most = max(most, len(queue._callers), len(queue._order), len(queue._ahead))
    assert most < 250
    queue.drop(steady)
    while (slice_ := queue.take(SLICE)) is not None:
        queue.fill(slice_, scores_of(slice_))
    assert not queue._callers
    assert not queue._ahead
    assert len(queue._order) <= 100


def test_a_finished_request_is_not_kept_for_its_deadline() -> None:
    queue = RequestQueue()
    kept = make_request([10], deadline=1e9)
    queue.add(kept)
    gone = []
    for _ in range(500):
        request = make_request([10], deadline=1e6)
        gone.append(weakref.ref(request))
        queue.add(request)
        queue.drop(request)
    del request
    gc.collect()
    assert not any(reference() for reference in gone)
    assert queue.next_deadline() == 1e9
    assert len(queue._deadlines) < 250
