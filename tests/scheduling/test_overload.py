"""The bound on pending work: callers block, are refused, or wait a while; nobody jumps the queue; and fairness."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from conftest import PATIENCE, Fifo, ranked, until
from interrupts import interrupted

from mp_rerank import ModelSpec, PoolClosedError, PoolOverloadedError, RequestTimeoutError, RerankerPool, RerankResult
from mp_rerank._scheduling.admission import Admission

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
    until(lambda: len(pool._dispatcher.admission._line) == 8)  # type: ignore[union-attr]
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
        while not pool._dispatcher.admission._line:  # type: ignore[union-attr]
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
    until(lambda: len(pool._dispatcher.admission._line) == 1)  # type: ignore[union-attr]
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
    admission = pool._dispatcher.admission  # type: ignore[union-attr]
    assert (admission.pairs, admission.tokens) == (0, 0)


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


def test_first_come_first_served() -> None:
    """A small request does not slip past a large one that waits for room: that might never find any."""
    admission = Admission(10, 10**6, "block")
    admission.admit("first", 8, 8)
    order = []

    def enter(pairs: int) -> None:
        admission.admit(pairs, pairs, pairs)
        order.append(pairs)

    threads = []
    for n, pairs in enumerate((9, 2, 1), 1):
        threads.append(threading.Thread(target=enter, args=(pairs,), daemon=True))
        threads[-1].start()
        until(lambda n=n: len(admission._line) == n)  # type: ignore[misc]
    admission.release("first")
    threads[0].join(PATIENCE)
    assert order == [9], "the last would have had room"
    admission.release(9)
    for thread in threads:
        thread.join(PATIENCE)
    assert sorted(order[1:]) == [1, 2]


def test_a_caller_who_gives_up_leaves_the_line_moving() -> None:
    admission = Admission(10, 10**6, 0.1)
    admission.admit("first", 10, 10)
    with pytest.raises(PoolOverloadedError):
        admission.admit("second", 5, 5)
    assert not admission._line
    admission.release("first")
    admission.admit("third", 5, 5)
    assert admission.pairs == 5


def test_an_interrupt_at_any_moment_in_line_leaves_no_place_behind() -> None:
    for moment in itertools.count(1):
        admission = Admission(10, 10**6, "block")
        admission.admit("first", 10, 10)
        ended = threading.Event()

        def leave(admission: Admission = admission, ended: threading.Event = ended) -> None:
            until(lambda: bool(admission._line) or ended.is_set())
            admission.release("first")

        leaving = threading.Thread(target=leave)
        leaving.start()
        came_that_far = interrupted(partial(admission.admit, "second", 5, 5), moment)
        ended.set()
        leaving.join(PATIENCE)
        admission.release("second")
        assert (admission.pairs, admission.tokens, admission._line) == (0, 0, {})
        if not came_that_far:
            break
    assert moment > 10


def test_an_interrupt_at_any_moment_of_being_refused_leaves_nobody_in_line() -> None:
    def enter(admission: Admission) -> None:
        with contextlib.suppress(PoolOverloadedError):
            admission.admit("second", 5, 5)

    for moment in itertools.count(1):
        admission = Admission(10, 10**6, "raise")
        admission.admit("first", 10, 10)
        came_that_far = interrupted(partial(enter, admission), moment)
        admission.release("second")
        assert (admission.pairs, admission.tokens, admission._line) == (10, 10, {})
        if not came_that_far:
            break
    assert moment > 10


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
