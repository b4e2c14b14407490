"""The bound on pending work: callers block, are refused, or wait a while; nobody jumps the queue; and fairness."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, Fifo, ranked, until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from interrupts import interrupted

from mp_rerank import ModelSpec, PoolClosedError, PoolOverloadedError, RequestTimeoutError, RerankerPool, RerankResult
from mp_rerank._scheduling.admission import Admission
from mp_rerank._scheduling.request import Request

MakePool = Callable[..., RerankerPool]


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


@pytest.fixture
def full(make_pool: MakePool, fifo: Fifo) -> Callable[..., RerankerPool]:
    """Makes a pool of one worker that stands at the gate, with all the work it may hold."""

    def make(**options: object) -> RerankerPool:
        pool = make_pool(workers=1, max_pending_pairs=10, **options).start()
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        pool.submit("query", documents(9))
        return pool

    return make


def test_raise(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload="raise")
    with pytest.raises(PoolOverloadedError, match=r"10 pairs .* are pending; no room for 1 ") as caught:
        pool.submit("query", ["document"])
    assert caught.value.pending_pairs == 10
    assert caught.value.pending_tokens > 0
    fifo.release()
    until(lambda: pool.stats().pending_pairs == 0)
    assert pool.rerank("query", documents(10)) == ranked("query", documents(10))


def test_wait_a_while(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload=0.2)
    start = time.monotonic()
    with pytest.raises(PoolOverloadedError):
        pool.submit("query", ["document"])
    assert time.monotonic() - start >= 0.2
    fifo.release()
    assert pool.rerank("query", ["document"]) == ranked("query", ["document"])


def test_block_until_there_is_room(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload="block")
    results = []
    waiting = [threading.Thread(target=lambda: results.append(pool.rerank("query", documents(3)))) for _ in range(8)]
    for thread in waiting:
        thread.start()
    until(lambda: "8 requests in line" in repr(pool))
    assert pool.stats().submitted == 2
    fifo.release()
    for thread in waiting:
        thread.join(PATIENCE)
    assert results == [ranked("query", documents(3))] * 8


def test_a_blocked_caller_s_own_timeout_counts(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload="block")
    with pytest.raises(RequestTimeoutError, match="to be admitted") as caught:
        pool.submit("query", documents(3), timeout=0.1)
    assert (caught.value.timeout, caught.value.scored, caught.value.total) == (0.1, 0, 3)
    fifo.release()


def test_a_blocked_caller_who_takes_what_there_is_gets_it(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload="block")
    results = pool.submit("query", documents(3), timeout=0.1, on_timeout="partial").result(0)
    assert [(result.document, result.relevance_score) for result in results] == [(d, None) for d in documents(3)]
    scores = pool.submit_pairs([("query", d) for d in documents(3)], timeout=0.1, on_timeout="partial").result(0)
    assert np.isnan(scores).tolist() == [True] * 3
    fifo.release()


def test_a_full_pool_does_not_hold_up_an_event_loop(make_pool: MakePool, fifo: Fifo) -> None:
    """However long the query is, and short the documents: what is bounded is both."""
    pool = make_pool(workers=1, max_pending_tokens=1000).start()
    pool.submit("word " * 700, [fifo.order])
    fifo.wait_until_read()

    async def main() -> list[RerankResult]:
        waiting = asyncio.create_task(pool.arerank("word " * 400, ["a", "b"]))
        while "1 requests in line" not in repr(pool):
            await asyncio.sleep(0.005)
        fifo.release()
        return await waiting

    assert asyncio.run(asyncio.wait_for(main(), PATIENCE)) == ranked("word " * 400, ["a", "b"])


@pytest.mark.parametrize("drain", [True, False])
def test_closing_turns_blocked_callers_away(full: Callable[..., RerankerPool], fifo: Fifo, drain: bool) -> None:
    pool = full(overload="block")
    errors: list[BaseException] = []

    def submit() -> None:
        try:
            pool.submit("query", documents(3))
        except PoolClosedError as error:
            errors.append(error)

    waiting = threading.Thread(target=submit)
    waiting.start()
    until(lambda: "1 requests in line" in repr(pool))
    closing = threading.Thread(target=lambda: pool.close(drain=drain))
    closing.start()
    waiting.join(PATIENCE)
    fifo.release()
    closing.join(PATIENCE)
    assert len(errors) == 1


def test_cancelled_expired_and_failed_requests_give_their_places_back(
    full: Callable[..., RerankerPool], fifo: Fifo
) -> None:
    pool = full(overload="raise")
    fifo.release()
    until(lambda: pool.stats().pending_pairs == 0)
    for _ in range(20):
        pool.submit("query", documents(9)).cancel()
        until(lambda: pool.stats().pending_pairs == 0)
        assert isinstance(pool.submit("query", documents(9), timeout=1e-9).exception(PATIENCE), RequestTimeoutError)
        until(lambda: pool.stats().pending_pairs == 0)
        assert pool.submit("query", ["!raise no"]).exception(PATIENCE)
        until(lambda: pool.stats().pending_pairs == 0)
    assert "0 pairs and 0 tokens pending, 0 requests in line" in repr(pool)


def test_tokens_are_bounded_too(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, max_pending_tokens=1000, overload="raise") as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        pool.submit("query", ["word " * 700])
        with pytest.raises(PoolOverloadedError):
            pool.submit("query", ["word " * 700])
        fifo.release()


def test_a_request_larger_than_the_bound_is_taken_alone(make_pool: MakePool) -> None:
    with make_pool(max_pending_pairs=10, overload="raise") as pool:
        assert pool.rerank("query", documents(100)) == ranked("query", documents(100))


# The bound by itself: time is an argument.


def request(pairs: int, tokens: int = 1, **options: Any) -> Request:
    return Request([("query", str(i)) for i in range(pairs)], [tokens] * pairs, lambda scores, _: scores, **options)


def test_first_come_first_served() -> None:
    """A small request does not slip past a large one that waits for room: that might never find any."""
    admission = Admission(10, 10**6, "block")
    first, large, small, smaller = request(8), request(9), request(2), request(1)
    assert admission.enter(first, 0.0)
    for waiting in (large, small, smaller):
        assert not admission.enter(waiting, 0.0)
    assert admission.let_in() == []
    admission.leave(first)
    assert admission.let_in() == [large], "the last would have had room"
    admission.leave(large)
    assert admission.let_in() == [small, smaller]


def test_whoever_gives_up_leaves_the_line_moving() -> None:
    admission = Admission(10, 10**6, 5.0)
    first, large, small = request(8), request(9), request(2)
    assert admission.enter(first, 0.0)
    assert not admission.enter(large, 1.0)
    assert not admission.enter(small, 2.0)
    assert admission.next_expiry() == 6.0
    assert admission.give_up(large)
    assert not admission.give_up(large)
    assert admission.let_in() == [small]
    assert admission.next_expiry() is None
    assert (admission.pairs, admission.tokens) == (10, 10)


def test_patience_and_deadlines_end_in_their_order() -> None:
    admission = Admission(10, 10**6, 5.0)
    full, patient, hasty = request(10), request(1), request(1, deadline=3.0, timeout=2.0)
    assert admission.enter(full, 0.0)
    assert not admission.enter(patient, 1.0)
    assert not admission.enter(hasty, 1.0)
    assert admission.next_expiry() == 3.0
    assert admission.expire(2.9) == []
    assert admission.expire(3.0) == [hasty]
    assert admission.next_expiry() == 6.0
    assert admission.expire(100.0) == [patient]
    assert admission.clear() == []


def test_only_what_is_far_from_the_bound_need_not_ask() -> None:
    admission = Admission(100, 1000, "block")
    assert admission.is_far_from_bound(request(5, 10), 10)
    assert not admission.is_far_from_bound(request(6, 1), 10)
    assert not admission.is_far_from_bound(request(1, 51), 10)
    assert admission.enter(request(1), 0.0)
    assert not admission.is_far_from_bound(request(5, 10), 10)
    assert admission.is_far_from_bound(request(4, 10), 10)


# The bound of each caller.


def of(caller: str, pairs: int, **options: Any) -> Request:
    return request(pairs, caller=caller, **options)


def test_a_caller_at_its_bound_waits_and_holds_up_nobody_else() -> None:
    admission = Admission(100, 10**6, "block", 10)
    first, second, third = of("a", 8), of("a", 5), of("a", 1)
    assert admission.enter(first, 0.0)
    assert not admission.enter(second, 0.0)
    assert not admission.enter(third, 0.0), "its line is first come, first served"
    assert admission.enter(of("b", 10), 0.0)
    assert not admission.enter(of("b", 1), 0.0)
    assert admission.enter(of("c", 5), 0.0)
    assert admission.let_in() == []
    admission.leave(first)
    assert admission.let_in() == [second, third]
    assert admission.pairs_of == {"a": 6, "b": 10, "c": 5}


def test_a_request_larger_than_its_caller_s_bound_is_taken_once_nothing_else_of_it_is_pending() -> None:
    admission = Admission(100, 10**6, "block", 10)
    small, large = of("a", 1), of("a", 50)
    assert admission.enter(small, 0.0)
    assert not admission.enter(large, 0.0)
    assert admission.enter(of("b", 51), 0.0)
    admission.leave(small)
    assert admission.let_in() == []  # the pool has no room: 51 of b's
    assert not admission.enter(of("c", 1), 0.0), "it does not slip past the one who waits for the pool's room"


def test_callers_who_wait_for_the_pool_s_room_are_let_in_in_turns() -> None:
    admission = Admission(10, 10**6, "block")
    full = of("x", 10)
    assert admission.enter(full, 0.0)
    many = [of("a", 1) for _ in range(50)]
    single, large, small = of("b", 1), of("c", 9), of("c", 1)
    for waiting in (*many, single, large, small):
        assert not admission.enter(waiting, 0.0)
    admission.leave(full)
    assert admission.let_in() == [many[0], single], "and then c's large one waits for room, and nobody slips past it"
    admission.leave(single)
    assert admission.let_in() == [large]
    admission.leave(large)
    assert admission.let_in() == [many[1], small, *many[2:9]]


def test_whoever_gives_up_at_the_head_of_a_caller_s_line_lets_the_next_one_in() -> None:
    for how in ("give up", "expire"):
        admission = Admission(100, 10**6, "block", 10)
        large, small = of("a", 9, deadline=1.0, timeout=1.0), of("a", 2)
        assert admission.enter(of("a", 8), 0.0)
        assert not admission.enter(large, 0.0)
        assert not admission.enter(small, 0.0)
        if how == "give up":
            assert admission.give_up(large)
        else:
            assert admission.expire(1.0) == [large]
        assert admission.let_in() == [small]


def test_what_is_far_from_the_pool_s_bound_may_be_near_its_caller_s() -> None:
    admission = Admission(1000, 10**6, "block", 10)
    assert admission.enter(of("a", 4), 0.0)
    assert admission.is_far_from_bound(of("b", 1), 5)
    assert not admission.is_far_from_bound(of("b", 1), 6)
    assert admission.is_far_from_bound(of("a", 1), 1)
    assert not admission.is_far_from_bound(of("a", 1), 2)
    assert not admission.enter(of("a", 7), 0.0)
    assert admission.is_far_from_bound(of("b", 1), 1), "a's line is nothing to b"
    assert not admission.is_far_from_bound(of("a", 1), 1)


def test_the_refusal_names_the_bound() -> None:
    admission = Admission(20, 10**6, "raise", 10)
    assert admission.enter(of("a", 8), 0.0)
    late = of("a", 3)
    assert not admission.enter(late, 0.0)
    assert admission.expire(0.0) == [late]
    assert str(admission.refusal(late)) == (
        "8 pairs of caller 'a' are pending; no room for 3 within max_pending_pairs_per_caller=10"
    )
    assert admission.refusal(of("b", 15)).args[0].startswith("8 pairs (8 tokens) are pending; no room for 15 (15)")


class AdmissionMachine(RuleBasedStateMachine):
    """Any interleaving: bounds hold, each caller's line is first come, first served, and nobody waits who has room."""

    @initialize(limit=st.sampled_from([None, 5, 12]))
    def start(self, limit: int | None) -> None:
        self.limit = limit
        self.admission = Admission(20, 10**6, 8.0, limit)
        self.now = 0.0
        self.admitted: list[Request] = []
        self.lines: dict[str, list[Request]] = {"a": [], "b": [], "c": []}

    def take(self, requests: list[Request]) -> None:
        for one in requests:
            assert self.lines[one.caller].pop(0) is one
            self.admitted.append(one)

    @rule(caller=st.sampled_from(["a", "b", "c"]), pairs=st.integers(1, 25))
    def enter(self, caller: str, pairs: int) -> None:
        one = of(caller, pairs)
        self.lines[caller].append(one)
        if self.admission.enter(one, self.now):
            self.take([one])

    @precondition(lambda self: self.admitted)
    @rule(chosen=st.integers(0, 99))
    def leave(self, chosen: int) -> None:
        self.admission.leave(self.admitted.pop(chosen % len(self.admitted)))

    @precondition(lambda self: any(self.lines.values()))
    @rule(chosen=st.integers(0, 99))
    def give_up(self, chosen: int) -> None:
        waiting = [one for line in self.lines.values() for one in line]
        one = waiting[chosen % len(waiting)]
        assert self.admission.give_up(one)
        self.lines[one.caller].remove(one)

    @rule(seconds=st.integers(0, 5))
    def expire(self, seconds: int) -> None:
        self.now += seconds
        for one in self.admission.expire(self.now):
            self.lines[one.caller].remove(one)

    @rule()
    def let_in(self) -> None:
        self.take(self.admission.let_in())
        heads = [line[0] for line in self.lines.values() if line]
        mine = [one for one in heads if self.admission._fits_caller(one)]
        assert not mine or any(not self.admission._fits(one) for one in mine)

    @invariant()
    def the_bounds_hold(self) -> None:
        if not hasattr(self, "admission"):
            return
        pairs = Counter[str]()
        for one in self.admitted:
            pairs[one.caller] += len(one.pairs)
        assert self.admission.pairs == pairs.total()
        assert self.admission.pairs_of == pairs
        assert pairs.total() <= 20 or len(self.admitted) == 1
        for caller, count in pairs.items():
            assert self.limit is None or count <= self.limit or sum(r.caller == caller for r in self.admitted) == 1
        assert sorted(self.admission._line) == sorted(one.number for line in self.lines.values() for one in line)
        assert self.admission._lines.keys() == {caller for caller, line in self.lines.items() if line}
        assert set(self.admission._turns) == {
            caller for caller, line in self.lines.items() if line and self.admission._fits_caller(line[0])
        }

    def teardown(self) -> None:
        """Left alone, all are let in."""
        if not hasattr(self, "admission"):
            return
        while self.admitted or any(self.lines.values()):
            self.let_in()
            self.leave(0)
        assert (self.admission.pairs, self.admission.tokens) == (0, 0)


AdmissionMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
test_any_interleaving_keeps_the_bounds_and_the_order_of_each_line = AdmissionMachine.TestCase


def test_a_caller_at_its_bound_is_refused_and_another_is_not(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, max_pending_pairs_per_caller=10, overload="raise") as pool:
        pool.submit("query", [fifo.order, *documents(9)], caller="a")
        fifo.wait_until_read()
        with pytest.raises(PoolOverloadedError, match="10 pairs of caller 'a' are pending") as caught:
            pool.submit("query", ["document"], caller="a")
        assert caught.value.pending_pairs == 10
        other = pool.submit("query", documents(10), caller="b")
        fifo.release()
        assert other.result(PATIENCE) == ranked("query", documents(10))
        until(lambda: pool.stats().pending_pairs == 0)
        assert pool.rerank("query", documents(3), caller="a") == ranked("query", documents(3))


def test_a_caller_blocked_at_its_bound_is_let_in_when_its_own_work_is_done(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=2, max_pending_pairs_per_caller=2) as pool:
        held = pool.submit("query", [fifo.order, "document"], caller="a")
        fifo.wait_until_read()
        found: list[list[RerankResult]] = []
        waiting = threading.Thread(target=lambda: found.append(pool.rerank("query", ["a"], caller="a")))
        waiting.start()
        until(lambda: "1 requests in line" in repr(pool))
        assert pool.rerank("query", documents(2), caller="b") == ranked("query", documents(2))
        assert not found
        fifo.release()
        waiting.join(PATIENCE)
        assert found == [ranked("query", ["a"])]
        assert held.result(PATIENCE)


def test_many_threads_at_once_are_all_held_to_the_bound(make_pool: MakePool, fifo: Fifo) -> None:
    """However many come between two looks of the dispatcher, no more are admitted than there is room for."""
    with make_pool(workers=1, max_pending_pairs=100, slice_tokens=1) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        threads = [threading.Thread(target=pool.rerank, args=(f"query {i}", documents(3))) for i in range(60)]
        for thread in threads:
            thread.start()
        until(lambda: pool.stats().pending_pairs == 100)
        assert pool.stats().submitted == 34
        fifo.release()
        for thread in threads:
            thread.join(PATIENCE)
        assert pool.stats().completed == 61


def test_an_interrupt_at_any_moment_in_line_leaves_no_place_behind(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, max_pending_pairs=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()

        def wait(count: int = 5) -> None:
            with contextlib.suppress(RequestTimeoutError):
                pool.submit("query", documents(count), timeout=0.02)

        moments = 0
        while interrupted(wait, moments + 1):
            moments += 1
            assert pool.stats().pending_pairs == 1
        assert moments > 10
        until(lambda: "0 requests in line" in repr(pool))
        fifo.release()
        assert held.result(PATIENCE)
        assert pool.rerank("query", documents(5)) == ranked("query", documents(5))


def test_waiting_for_room_takes_no_thread_from_asyncio_s_own_pool(make_pool: MakePool, fifo: Fifo) -> None:
    """The application's ``to_thread`` goes on, however many requests wait."""
    pool = make_pool(workers=1, max_pending_pairs=1).start()
    pool.submit("query", [fifo.order])
    fifo.wait_until_read()

    async def main() -> list[list[RerankResult]]:
        waiting = [asyncio.create_task(pool.arerank(f"query {i}", ["a"])) for i in range(100)]
        while "100 requests in line" not in repr(pool):
            await asyncio.sleep(0.005)
        assert await asyncio.to_thread(lambda: "free") == "free"
        waiting[0].cancel()
        fifo.release()
        return await asyncio.gather(*waiting[1:])

    found = asyncio.run(asyncio.wait_for(main(), PATIENCE))
    assert found == [ranked(f"query {i}", ["a"]) for i in range(1, 100)]


def test_a_full_pool_that_raises_does_so_in_asyncio_too(full: Callable[..., RerankerPool], fifo: Fifo) -> None:
    pool = full(overload="raise")
    with pytest.raises(PoolOverloadedError):
        asyncio.run(pool.arerank("query", documents(1)))
    with pytest.raises(RequestTimeoutError):
        asyncio.run(pool.asubmit_pairs([("query", fifo.order)], timeout=1e-9))
    fifo.release()


def test_small_requests_overtake_a_large_one(make_pool: MakePool) -> None:
    """Ten documents are done long before the 5,000 that came first; ``python -m bench fairness`` measures it."""
    with make_pool(ModelSpec("0.00002", loader="fakes:load_paced")) as pool:
        large = pool.submit("query", [f"document {i} {'word ' * 20}" for i in range(5000)])
        for i in range(20):
            assert pool.rerank(f"query {i}", documents(10)) == ranked(f"query {i}", documents(10))
            assert not large.done()
        assert len(large.result(PATIENCE)) == 5000


def test_callers_who_never_pause_do_not_keep_workers_waiting(make_pool: MakePool) -> None:
    with make_pool() as pool:
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                pool.stats()

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        try:
            for i in range(20):
                assert pool.rerank(f"query {i}", documents(10)) == ranked(f"query {i}", documents(10))
        finally:
            stop.set()
            for thread in asking:
                thread.join()
