"""Callers: handles, whose requests are whose, equal shares between them, and the counts of each."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked, until
from fakes import scores_of

from mp_rerank import CallerStats, ModelSpec, PoolClosedError, RequestTimeoutError, RerankerPool, shared_pool
from mp_rerank._scheduling.callers import MAX_IDLE_CALLERS, CallerCounts
from mp_rerank._scheduling.request import Request

MakePool = Callable[..., RerankerPool]


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


@pytest.fixture
def other_fifo(tmp_path: Path) -> Fifo:
    return Fifo(tmp_path / "other gate")


# Handles.

ASK: dict[str, Callable[[RerankerPool], object]] = {
    "submit": lambda pool: pool.submit("query", documents(3)).result(PATIENCE),
    "submit_pairs": lambda pool: pool.submit_pairs([("query", "document")]).result(PATIENCE),
    "rerank": lambda pool: pool.rerank("query", documents(3)),
    "arerank": lambda pool: asyncio.run(pool.arerank("query", documents(3))),
    "asubmit_pairs": lambda pool: asyncio.run(pool.asubmit_pairs([("query", "document")])),
    "stream": lambda pool: list(pool.stream("query", documents(3))),
    "astream": lambda pool: asyncio.run(pool.astream("query", documents(3)).__anext__()),
    "predict": lambda pool: pool.predict([("query", "document")]),
    "rank": lambda pool: pool.rank("query", documents(3)),
}


def test_every_call_is_counted_as_its_handle_s_caller_s(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        for call in ASK.values():
            call(pool)
            call(pool.for_caller("a"))
            call(pool.for_caller("b").for_caller("a"))
        pool.rerank("query", documents(3), caller="a")
        pool.for_caller("a").rerank("query", documents(3), caller="b")
        pool.for_caller("a").rerank("query", documents(3), caller=None)
        pool.for_caller("c").for_caller("default").rerank("query", documents(3))
        callers = pool.stats().callers
        assert {name: counts.submitted for name, counts in callers.items()} == {
            "default": len(ASK) + 1,
            "a": 2 * len(ASK) + 2,
            "b": 1,
        }


def test_a_handle_is_the_pool_in_all_but_the_caller(make_pool: MakePool) -> None:
    pool = make_pool(workers=1)
    handle = pool.for_caller("a")
    assert "not started" in repr(handle)
    assert isinstance(handle, RerankerPool)
    assert handle.start() is handle
    assert handle.rerank("query", documents(3)) == ranked("query", documents(3))
    assert np.array_equal(handle.predict([("query", d) for d in documents(3)]), scores_of("query", documents(3)))
    assert handle.stats() == pool.stats()
    assert handle.workers()[0].pid == pool.workers()[0].pid
    assert {worker.pid for worker in handle.memory().workers} == {worker.pid for worker in pool.memory().workers}
    assert handle.plan is pool.plan
    assert handle.config is pool.config
    handle.reload(ModelSpec("other", loader="fakes:load_salted"))
    assert handle.spec.name == pool.spec.name == "other"
    assert repr(handle) == f"<caller 'a' of {pool!r}>"
    pool.close()
    with pytest.raises(PoolClosedError, match="the pool is closed"):
        handle.rerank("query", documents(3))


def test_a_handle_starts_the_pool_with_its_first_request(make_pool: MakePool) -> None:
    pool = make_pool(workers=1)
    with pool.for_caller("a") as handle:
        assert handle.rerank("query", documents(3)) == ranked("query", documents(3))
    assert pool.rerank("query", documents(3)) == ranked("query", documents(3))


@pytest.mark.parametrize("drain", [True, False])
def test_closing_a_handle_ends_neither_the_pool_nor_what_is_pending(
    make_pool: MakePool, fifo: Fifo, drain: bool
) -> None:
    with make_pool(workers=1) as pool:
        handle, other = pool.for_caller("a"), pool.for_caller("a")
        held = handle.submit("query", [fifo.order])
        fifo.wait_until_read()
        handle.close(drain=drain)
        handle.close()
        for call in (ASK["submit"], ASK["arerank"], ASK["stream"], ASK["astream"], RerankerPool.start):
            with pytest.raises(PoolClosedError, match="this handle of the pool, for caller 'a', is closed"):
                call(handle)
        assert handle.stats().pending_requests == 1
        fifo.release()
        assert held.result(PATIENCE)
        assert other.rerank("query", documents(3)) == ranked("query", documents(3))


def test_a_handle_keeps_its_pool_and_a_pool_no_handle(make_pool: MakePool) -> None:
    pool = RerankerPool(FAKE, devices="cpu", workers=1).start()
    gone = weakref.ref(pool.for_caller("a"))
    handle, kept = pool.for_caller("b"), weakref.ref(pool)
    del pool
    gc.collect()
    assert gone() is None
    assert handle.rerank("query", documents(3)) == ranked("query", documents(3))
    del handle
    gc.collect()
    assert kept() is None


@pytest.mark.usefixtures("own_registry")
def test_handles_are_copied_as_themselves_and_pickled_as_their_pool_is(make_pool: MakePool) -> None:
    handle = make_pool(workers=1).for_caller("a")
    assert copy.copy(handle) is handle
    assert copy.deepcopy([handle])[0] is handle
    with pytest.raises(TypeError, match="a RerankerPool cannot be pickled"):
        pickle.dumps(handle)
    shared = shared_pool(FAKE, "cpu", workers=1)
    again = pickle.loads(pickle.dumps(shared.for_caller("a")))
    assert repr(again) == repr(shared.for_caller("a"))
    assert again._pool is shared


def test_a_fork_has_no_handle(make_pool: MakePool) -> None:
    pool = make_pool()
    handle = pool.for_caller("a")
    pool._owner = os.getpid() + 1  # as it is in a fork
    with pytest.raises(PoolClosedError, match="belongs to process"):
        handle.submit("query", documents(1))
    pool._owner = os.getpid()


# Shares.


@pytest.mark.parametrize("pending", [1, 50])
def test_a_caller_s_single_request_passes_by_however_much_another_has_pending(
    make_pool: MakePool, fifo: Fifo, other_fifo: Fifo, pending: int
) -> None:
    with make_pool(workers=1, slice_tokens=1) as pool:
        agent, other = pool.for_caller("agent"), pool.for_caller("other")
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        texts = documents(100)
        many = [agent.submit(f"query {i}", texts[i::pending], priority=8) for i in range(pending)]
        single = other.submit("query", [other_fifo.order], priority=-8)
        fifo.release()
        other_fifo.wait_until_read()
        # The worker had one slice waiting as the other came, and one more was sent while it was scored.
        assert 100 - 5 <= pool.stats().callers["agent"].pending_pairs <= 100
        assert pool.stats().scored_pairs <= 5
        other_fifo.release()
        assert single.result(PATIENCE)
        assert held.result(PATIENCE)
        assert all(future.result(PATIENCE) for future in many)


def test_a_reload_keeps_the_shares_equal(make_pool: MakePool, fifo: Fifo, other_fifo: Fifo) -> None:
    """What waits moves to the new model's workers: there too, an agent's many do not hold up another's one."""
    with make_pool(workers=1, slice_tokens=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        many = [pool.submit(f"query {i}", documents(2), caller="agent") for i in range(50)]
        single = pool.submit("query", [other_fifo.order], caller="other")
        pool.reload(ModelSpec("other", loader="fakes:load_salted"))
        other_fifo.wait_until_read()
        assert pool.stats().scored_pairs <= 5
        for gate in (fifo, other_fifo):
            gate.release()
        assert single.result(PATIENCE)[0].relevance_score == scores_of("salted query", [other_fifo.order])[0]
        assert held.result(PATIENCE)
        assert all(future.result(PATIENCE) for future in many)
        assert {name: c.completed for name, c in pool.stats().callers.items()} == {
            "default": 1,
            "agent": 50,
            "other": 1,
        }


def test_callers_who_want_the_same_pairs_share_the_scores(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        futures = [pool.for_caller(f"caller {i}").submit("query", documents(10)) for i in range(5)]
        futures[0].cancel()
        failing = pool.for_caller("failing").submit("query", [*documents(10), "!raise no"])
        fifo.release()
        for future in futures[1:]:
            assert future.result(PATIENCE) == ranked("query", documents(10))
        assert failing.exception(PATIENCE)
        assert held.result(PATIENCE)
        assert pool.stats().coalesced_pairs >= 30
        callers = pool.stats().callers
        assert callers["caller 0"] == CallerStats(submitted=1, cancelled=1)
        assert callers["caller 4"] == CallerStats(submitted=1, completed=1)
        assert callers["failing"] == CallerStats(submitted=1, failed=1)


# Counts.


def test_each_caller_is_counted_by_itself(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        a, b = pool.for_caller("a"), pool.for_caller("b")
        assert pool.stats().callers == {}
        held = a.submit("query", [fifo.order])
        fifo.wait_until_read()
        a.submit("query", documents(5)).cancel()
        failing = a.submit("query", ["!raise no"])
        with pytest.raises(RequestTimeoutError):
            b.rerank("query", documents(4), timeout=0.01)
        waiting = b.submit("query", documents(3))
        until(lambda: pool.stats().cancelled == 1)
        stats = pool.stats()
        assert stats.callers == {
            "a": CallerStats(submitted=3, cancelled=1, pending_requests=2, pending_pairs=2),
            "b": CallerStats(submitted=2, timed_out=1, pending_requests=1, pending_pairs=3),
        }
        assert stats.pending_pairs == 5
        fifo.release()
        assert held.result(PATIENCE)
        assert failing.exception(PATIENCE)
        assert waiting.result(PATIENCE)
        until(lambda: pool.stats().pending_requests == 0)
        assert pool.stats().callers == {
            "a": CallerStats(submitted=3, completed=1, failed=1, cancelled=1),
            "b": CallerStats(submitted=2, completed=1, timed_out=1),
        }
        assert stats.callers["a"].completed == 0, "a copy"


def test_of_callers_that_come_and_go_the_last_thousand_are_remembered() -> None:
    counts = CallerCounts()

    def make(caller: str) -> Request:
        return Request([("query", "document")], [10], lambda scores, _: scores, caller=caller)

    busy = make("busy")
    counts.admitted(busy)
    for i in range(3 * MAX_IDLE_CALLERS):
        for caller in (f"caller {i}", "steady"):
            request = make(caller)
            counts.admitted(request)
            counts.done(request, "completed")
    found = counts.snapshot()
    assert len(found) == MAX_IDLE_CALLERS + 1
    assert found["busy"].pending_requests == 1
    assert found["steady"].completed == 3 * MAX_IDLE_CALLERS
    assert "caller 2000" not in found
    assert f"caller {3 * MAX_IDLE_CALLERS - 1}" in found
    again = make("caller 0")
    counts.admitted(again)
    assert counts.snapshot()["caller 0"] == CallerStats(submitted=1, pending_requests=1, pending_pairs=1)
