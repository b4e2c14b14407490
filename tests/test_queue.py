"""The queue by itself: whatever happens to a pair, it is in one place; and nobody waits for ever."""

from __future__ import annotations

import gc
import weakref
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mp_rerank.batching import PIECE_TOKENS, RequestQueue, Slice
from mp_rerank.request import Request, Scores

MAX_ATTEMPTS = 3
SLICE = 900  # tokens

lengths = st.integers(1, 300)
priorities = st.integers(-8, 8)


def make_request(tokens: list[int], priority: int = 0, deadline: float | None = None) -> Request:
    pairs = [("query", f"document {i}") for i in range(len(tokens))]
    return Request(pairs, tokens, lambda scores, scored: scores, priority=priority, deadline=deadline)


def scores_of(piece: Slice) -> Scores:
    """A score for each pair that no other pair of the test has."""
    return np.array([request.number * 1000 + i for request, indices in piece.parts for i in indices], dtype=np.float32)


def pairs_of(piece: Slice) -> list[tuple[int, int]]:
    return [(request.number, i) for request, indices in piece.parts for i in indices]


class QueueMachine(RuleBasedStateMachine):
    """Any interleaving of what can happen. A live request's pair is waiting, out or scored: never two, never none."""

    @initialize()
    def start(self) -> None:
        self.queue = RequestQueue()
        self.next_queue = RequestQueue()  # a reload's
        self.now = 0.0
        self.live: dict[int, Request] = {}
        self.done: list[Request] = []  # with every score
        self.out: list[tuple[RequestQueue, Slice]] = []
        self.scored: Counter[tuple[int, int]] = Counter()

    @rule(
        tokens=st.lists(lengths, min_size=1, max_size=20),
        priority=priorities,
        patience=st.none() | st.integers(0, 10),
    )
    def add(self, tokens: list[int], priority: int, patience: int | None) -> None:
        request = make_request(tokens, priority, None if patience is None else self.now + patience)
        self.live[request.number] = request
        self.queue.add(request)

    @rule(budget=st.integers(1, 1500), which=st.booleans())
    def take(self, budget: int, which: bool) -> None:
        queue = self.next_queue if which else self.queue
        waiting = queue.waiting_tokens
        piece = queue.take(budget)
        assert (piece is None) == (waiting == 0)
        if piece is not None:
            assert len(piece) >= 1
            assert piece.tokens == sum(r.tokens[i] for r, indices in piece.parts for i in indices)
            assert piece.tokens <= budget or len(piece) == 1
            assert all(request.number in self.live for request, _ in piece.parts)
            self.out.append((queue, piece))

    def ending(self, chosen: int) -> tuple[RequestQueue, Slice]:
        return self.out.pop(chosen % len(self.out))

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99))
    def fill(self, chosen: int) -> None:
        queue, piece = self.ending(chosen)
        self.scored.update(pair for pair in pairs_of(piece) if pair[0] in self.live)
        for request in queue.fill(piece, scores_of(piece)):
            assert request.scores is not None
            assert request.scores.tolist() == [request.number * 1000 + i for i in range(len(request.pairs))]
            assert request.scored.all()
            self.done.append(self.live.pop(request.number))

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99), raised=st.booleans())
    def crash(self, chosen: int, raised: bool) -> None:
        queue, piece = self.ending(chosen)
        suspect = queue.raised(piece) if raised else queue.crashed(piece, MAX_ATTEMPTS)
        if suspect is not None:
            assert pairs_of(piece) == [(suspect.request.number, suspect.index)]
            assert raised or suspect.attempts == MAX_ATTEMPTS
            queue.drop(suspect.request)
            del self.live[suspect.request.number]

    @precondition(lambda self: self.out)
    @rule(chosen=st.integers(0, 99))
    def put_back(self, chosen: int) -> None:
        queue, piece = self.ending(chosen)
        queue.put_back(piece)

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
        for number in due:
            del self.live[number]
        deadlines = [request.deadline for request in self.live.values() if request.deadline is not None]
        nexts = [d for d in (self.queue.next_deadline(), self.next_queue.next_deadline()) if d is not None]
        assert min(nexts, default=None) == min(deadlines, default=None)

    @rule()
    def reload(self) -> None:
        for request in self.queue.drop_untouched():
            assert not request.scored.any()
            self.next_queue.add(request)

    @invariant()
    def every_pair_is_in_one_place(self) -> None:
        assert {*self.queue.live, *self.next_queue.live} == set(self.live)
        out = Counter(pair for _, piece in self.out for pair in pairs_of(piece) if pair[0] in self.live)
        for number, request in self.live.items():
            places = Counter([*request.todo, *request.alone])
            places.update(i for n, i in out.elements() if n == number)
            places.update(i for n, i in self.scored.elements() if n == number)
            assert places == Counter(range(len(request.pairs)))
            assert request.missing == len(request.pairs) - sum(n == number for n, _ in self.scored)
        for queue in (self.queue, self.next_queue):
            waiting = sum(r.tokens[i] for r in queue.live.values() for i in (*r.todo, *r.alone))
            assert queue.waiting_tokens == waiting

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
        assert max(self.scored.values(), default=1) == 1


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_any_interleaving_conserves_every_pair = QueueMachine.TestCase


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.lists(st.tuples(lengths, st.integers(0, 9)), min_size=1, max_size=15), min_size=1, max_size=8),
    max_attempts=st.integers(1, 4),
)
def test_poison_is_found_and_the_innocent_are_scored(sizes: list[list[tuple[int, int]]], max_attempts: int) -> None:
    queue = RequestQueue()
    poison = set()
    for pairs in sizes:
        request = make_request([tokens for tokens, _ in pairs])
        poison |= {(request.number, i) for i, (_, chance) in enumerate(pairs) if chance == 0}
        queue.add(request)
    total, deaths, failed, complete = len(queue.live), 0, set(), 0
    while (piece := queue.take(SLICE)) is not None:
        if poison.isdisjoint(pairs_of(piece)):
            complete += len(queue.fill(piece, scores_of(piece)))
            continue
        deaths += 1
        suspect = queue.crashed(piece, max_attempts)
        if suspect is not None:
            assert (suspect.request.number, suspect.index) in poison
            queue.drop(suspect.request)
            failed.add(suspect.request.number)
    assert failed == {number for number, _ in poison}
    assert complete == total - len(failed)
    # Of one request the first poison found is enough; with max_attempts=1 it first has to be alone.
    assert deaths <= max(2, max_attempts) * len(poison)


def test_pairs_of_a_slice_that_killed_twice_go_out_one_by_one() -> None:
    queue = RequestQueue()
    queue.add(make_request([10] * 5))
    for _ in range(2):
        piece = queue.take(SLICE)
        assert piece is not None
        assert len(piece) == 5
        assert queue.crashed(piece, MAX_ATTEMPTS) is None
    other = make_request([10] * 5)
    queue.add(other)
    sizes = []
    while (piece := queue.take(SLICE)) is not None:
        sizes.append(len(piece))
        queue.fill(piece, scores_of(piece))
    assert sorted(sizes) == [1, 1, 1, 1, 1, 5]


def test_a_slice_is_one_request_s_piece_or_several_whole_requests() -> None:
    queue = RequestQueue()
    large = make_request([100] * 50)
    queue.add(large)
    small = [make_request([50] * 4) for _ in range(6)]
    for request in small:
        queue.add(request)
    pieces = []
    while (piece := queue.take(SLICE)) is not None:
        pieces.append([(request, len(indices)) for request, indices in piece.parts])
    assert pieces[0] == [(request, 4) for request in small[:4]]
    assert pieces[1] == [(request, 4) for request in small[4:]]
    assert pieces[2:] == [[(large, 9)]] * 5 + [[(large, 5)]]


def served_before(queue: RequestQueue, request: Request, budget: int = SLICE) -> int:
    """Tokens of others taken before, or with, the last pair of ``request``."""
    others = 0
    while request.waiting:
        piece = queue.take(budget)
        assert piece is not None
        others += sum(r.tokens[i] for r, indices in piece.parts for i in indices if r is not request)
        queue.fill(piece, scores_of(piece))
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
    assert others <= len(backlog) * (sum(newcomer) + PIECE_TOKENS + 2 * SLICE)


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
    limit = shares * (50 * old_size + PIECE_TOKENS + SLICE) + at_once * (50 * size + SLICE)
    while old.waiting:
        while len(queue.live) <= at_once:
            queue.add(make_request([50] * size, high))
            newcomers += 1
        piece = queue.take(SLICE)
        assert piece is not None
        stream += sum(r.tokens[i] for r, indices in piece.parts for i in indices if r is not old)
        queue.fill(piece, scores_of(piece))
        assert stream <= limit


@pytest.mark.parametrize("steps", [-2, -1, 0, 1, 3])
def test_each_step_of_priority_doubles_the_share(steps: int) -> None:
    queue = RequestQueue()
    one, other = make_request([30] * 20_000), make_request([30] * 20_000, steps)
    queue.add(one)
    queue.add(other)
    taken = {one: 0, other: 0}
    while one.waiting and other.waiting:
        piece = queue.take(SLICE)
        assert piece is not None
        for request, indices in piece.parts:
            taken[request] += len(indices)
    assert taken[other] / taken[one] == pytest.approx(2.0**steps, rel=0.02)


def test_a_request_of_higher_priority_comes_before_those_that_wait() -> None:
    queue = RequestQueue()
    for _ in range(100):
        queue.add(make_request([80] * 10))
    urgent = make_request([80] * 10, 3)
    queue.add(urgent)
    assert served_before(queue, urgent) == 0


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
