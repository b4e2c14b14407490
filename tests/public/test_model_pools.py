"""`ModelPools`: several models within a bound on memory. Models are as large as the tests say."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import random
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked, until
from fakes import score_of
from interrupts import at_moment

from mp_rerank import (
    ModelLoadError,
    ModelPools,
    ModelSpec,
    PoolClosedError,
    PoolConfig,
    RequestTimeoutError,
    RerankerPool,
    RerankError,
    WorkerCrashedError,
    _model_manager,
    _tenants,
    shared_pool,
)
from mp_rerank.results import PoolMemory, WorkerMemory

MakePools = Callable[..., ModelPools]

DOCUMENTS = [f"document {i}" for i in range(10)]
A, B, C = (replace(FAKE, name=name) for name in "ABC")
SIZE = 100


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of a worker, by its model's name: estimated, and under ``"measured NAME"`` measured. Else 100."""
    sizes: dict[str, int] = {}

    def measure(pool: RerankerPool) -> int:
        name = pool.spec.name
        return sizes.get(f"measured {name}", len(pool.workers()) * sizes.get(name, SIZE))

    monkeypatch.setattr(
        _model_manager, "estimate_memory", lambda spec, workers, _: workers * sizes.get(spec.name, SIZE)
    )
    monkeypatch.setattr(_model_manager, "_measure", measure)
    monkeypatch.setattr(_model_manager, "MEASURE_SECONDS", -1.0)
    return sizes


@pytest.fixture
def make_pools(sizes: dict[str, int]) -> Iterator[MakePools]:
    """Makes them for models on threads, which load in no time, unless it is told otherwise."""
    made: list[ModelPools] = []

    def make(memory: int | str, **options: Any) -> ModelPools:
        if "workers" not in options:
            options.setdefault("isolation", "thread")
        made.append(ModelPools(memory, devices="cpu", restart_backoff=0.01, **options))
        return made[-1]

    yield make
    for pools in made:
        pools.close(drain=False)


def states(pools: ModelPools) -> dict[str, str]:
    return {kept.model: kept.state for kept in pools.stats().models}


def test_a_pool_is_started_on_demand_and_found_again(make_pools: MakePools) -> None:
    pools = make_pools(3 * SIZE)
    first = pools.pool(A)
    assert pools.stats().models == ()
    assert "not loaded" in repr(first)
    assert (first.workers(), first.stats().submitted) == ([], 0)
    assert first.rerank("query", DOCUMENTS, top_n=3) == ranked("query", DOCUMENTS)[:3]
    second = pools.pool(replace(A))
    assert second.submit("query", DOCUMENTS).result(PATIENCE) == ranked("query", DOCUMENTS)
    assert second.submit_pairs([("q", "d")]).result(PATIENCE).tolist() == [score_of("q", "d")]
    assert second.predict(("q", "d")) == np.float32(score_of("q", "d"))
    assert second.rank("q", ["d"])[0]["score"] == score_of("q", "d")
    assert second.submit("query", []).result(PATIENCE) == []
    assert first.stats().submitted == 5
    assert len(first.workers()) == len(first.plan.seats) == 1
    [kept] = pools.stats().models
    assert (kept.model, kept.state, kept.workers, kept.memory, kept.requests) == ("A", "ready", 1, SIZE, 0)
    assert (pools.stats().memory, pools.stats().memory_limit, pools.stats().started) == (SIZE, 3 * SIZE, 1)


def test_settings_make_another_model(make_pools: MakePools) -> None:
    pools = make_pools(5 * SIZE)
    specs = [A, replace(A, activation="identity"), replace(A, loader="fakes:load_salted")]
    for spec in specs:
        pools.pool(spec).start()
    pools.pool(A, batch_tokens=512).start()
    assert pools.stats().started == 4
    assert pools.pool(A).rerank("q", DOCUMENTS) != pools.pool(specs[2]).rerank("q", DOCUMENTS)
    pools.pool(A, isolation="thread").start()
    assert pools.stats().started == 4


def test_equal_specs_are_one_model_whatever_is_in_them() -> None:
    def key(**given: Any) -> object:
        return _tenants.key_of(ModelSpec("model", model_kwargs=given), PoolConfig())

    assert key(a=1, b=[1, {"c": {2}}]) == key(b=[1, {"c": {2}}], a=1)
    assert len({key(a=1), key(a=True), key(a="1"), key(a=[1]), key(b=1), key(a=1, b=1)}) == 6
    assert key(a=np.arange(2)) == key(a=np.arange(2)), "what has no hash counts as it is written"


def test_many_threads_that_ask_at_once_load_it_once(make_pools: MakePools, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    spec = ModelSpec(f"!note {notes}", loader="fakes:load_obeying")
    pools = make_pools(SIZE)
    start = threading.Barrier(32)

    def agent(number: int) -> bool:
        start.wait(PATIENCE)
        return pools.pool(spec).rerank(f"query {number}", DOCUMENTS) == ranked(f"query {number}", DOCUMENTS)

    with ThreadPoolExecutor(32) as agents:
        assert all(agents.map(agent, range(32)))
    assert notes.read_text() == "."


def test_the_idle_one_that_was_used_longest_ago_makes_room(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)
    for spec in (A, B, A, C):
        assert pools.pool(spec).rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert states(pools) == {"A": "ready", "C": "ready"}
    assert pools.pool(B).workers() == []
    pools.pool(B).start()
    assert states(pools) == {"B": "ready", "C": "ready"}
    assert (pools.stats().started, pools.stats().retired) == (4, 2)


def test_as_many_are_retired_as_are_needed(make_pools: MakePools, sizes: dict[str, int]) -> None:
    pools = make_pools(3 * SIZE)
    sizes["large"] = 2 * SIZE
    for spec in (A, B, C, replace(FAKE, name="large")):
        pools.pool(spec).start()
    assert states(pools) == {"C": "ready", "large": "ready"}


def test_one_that_works_is_retired_only_once_it_is_done(make_pools: MakePools, fifo: Fifo) -> None:
    pools = make_pools(SIZE)
    working = pools.pool(A).submit("query", [fifo.order])
    fifo.wait_until_read()
    with ThreadPoolExecutor(4) as agents:
        other = agents.submit(pools.pool(B).rerank, "query", DOCUMENTS)
        until(lambda: states(pools) == {"A": "leaving", "B": "waiting"})
        again = agents.submit(pools.pool(A).rerank, "query", DOCUMENTS)  # it arrives as its pool is being retired
        until(lambda: sum(kept.waiting for kept in pools.stats().models) == 2)
        assert not other.done()
        assert pools.stats().memory == SIZE
        fifo.release()
        assert len(working.result(PATIENCE)) == 1
        assert other.result(PATIENCE) == again.result(PATIENCE) == ranked("query", DOCUMENTS)
    assert pools.stats().started == 3, "A, then B, then A again"


def test_idle_ones_go_before_those_that_work(make_pools: MakePools, fifo: Fifo) -> None:
    pools = make_pools(2 * SIZE)
    working = pools.pool(A).submit("query", [fifo.order])
    fifo.wait_until_read()
    pools.pool(B).start()  # used later than A, and idle
    pools.pool(C).start()
    assert states(pools) == {"A": "ready", "C": "ready"}
    fifo.release()
    working.result(PATIENCE)


def test_nobody_leaves_in_vain_for_one_that_waits_for_another_to_start(
    make_pools: MakePools, sizes: dict[str, int], fifo: Fifo
) -> None:
    pools = make_pools(2 * SIZE)
    gated = ModelSpec(fifo.order, loader="fakes:load_obeying")
    sizes["large"] = 2 * SIZE
    pools.pool(A).start()
    with ThreadPoolExecutor(2) as agents:
        starting = agents.submit(pools.pool(gated).start)
        fifo.wait_until_read()
        large = agents.submit(pools.pool(replace(FAKE, name="large")).start)
        until(lambda: states(pools).get("large") == "waiting")
        assert states(pools)["A"] == "ready"
        fifo.release()
        starting.result(PATIENCE)
        large.result(PATIENCE)
    assert states(pools) == {"large": "ready"}


def test_many_threads_with_more_models_than_there_is_room_for(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)
    specs = [replace(FAKE, name=f"model {i}") for i in range(4)]
    over: list[int] = []

    def agent(number: int) -> None:
        choose = random.Random(number)
        for turn in range(12):
            query = f"query {number} {turn}"
            assert pools.pool(choose.choice(specs)).rerank(query, DOCUMENTS) == ranked(query, DOCUMENTS)
            if (memory := pools.stats().memory) > 2 * SIZE:
                over.append(memory)

    with ThreadPoolExecutor(12) as agents:
        list(agents.map(agent, range(12)))
    stats = pools.stats()
    assert (stats.failed, over) == (0, [])
    assert stats.started > len(specs)
    until(lambda: all(kept.requests == 0 for kept in pools.stats().models))


def test_one_that_cannot_be_started_is_not_kept(make_pools: MakePools, tmp_path: Path) -> None:
    pools = make_pools(SIZE)
    spec = ModelSpec(f"!once {tmp_path / 'met'} !raise not yet", loader="fakes:load_obeying")
    with pytest.raises(ModelLoadError, match="not yet"):
        pools.pool(spec).rerank("query", DOCUMENTS)
    assert pools.pool(spec).rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert (pools.stats().started, pools.stats().failed) == (1, 1)


def test_all_who_wait_get_the_error_of_the_start_each_their_own(make_pools: MakePools, fifo: Fifo) -> None:
    spec = ModelSpec(f"{fifo.order}", loader="fakes:load_obeying")
    pools = make_pools(SIZE, max_restarts=0, workers=1)
    with ThreadPoolExecutor(3) as agents:
        asked = [agents.submit(pools.pool(spec).start) for _ in range(3)]
        fifo.wait_until_read()
        until(lambda: [kept.waiting for kept in pools.stats().models] == [3])
        os.kill(fifo.pid, signal.SIGKILL)
        fifo.release()
        errors = [future.exception(PATIENCE) for future in asked]
    assert all(isinstance(error, WorkerCrashedError) for error in errors), errors
    assert len({id(error) for error in errors}) == 3
    until(lambda: pools.stats().models == ())


def test_one_whose_workers_are_given_up_is_replaced(make_pools: MakePools) -> None:
    pools = make_pools(SIZE, workers=1, max_restarts=0, max_attempts=3)
    spec = ModelSpec("deadly", loader="fakes:load_deadly")
    for times in (1, 2):
        with pytest.raises(WorkerCrashedError):
            pools.pool(spec).rerank("query", ["d"])
        assert pools.stats().started == times


def test_what_the_bound_cannot_hold_by_itself_is_an_error_that_says_so(
    make_pools: MakePools, sizes: dict[str, int]
) -> None:
    pools = make_pools(10 * 2**20)
    pools.pool(A).start()
    sizes["huge"] = 11 * 2**20
    with pytest.raises(
        ModelLoadError, match=r"cannot load huge: it takes about 11 MiB, and memory=10 MiB is the bound"
    ):
        pools.pool(replace(FAKE, name="huge")).start()
    assert states(pools) == {"A": "ready"}, "nobody made room in vain"
    assert pools.stats().failed == 1


def test_one_that_is_larger_than_estimated_has_others_retired(make_pools: MakePools, sizes: dict[str, int]) -> None:
    pools = make_pools(3 * SIZE)
    pools.pool(A).start()
    sizes["measured B"] = int(2.5 * SIZE)
    pools.pool(B).start()
    until(lambda: states(pools) == {"B": "ready"})
    [kept] = pools.stats().models
    assert (kept.memory, kept.measured) == (250, True)


def test_one_that_has_grown_counts_as_it_is(make_pools: MakePools, sizes: dict[str, int]) -> None:
    pools = make_pools(2 * SIZE)
    pools.pool(A).start()
    sizes["measured A"] = 2 * SIZE
    pools.pool(B).start()
    assert states(pools) == {"B": "ready"}


def test_a_worker_killed_while_its_pool_is_being_retired_fails_nobody(
    make_pools: MakePools, fifo: Fifo, tmp_path: Path
) -> None:
    pools = make_pools(SIZE, workers=1)
    working = pools.pool(A).submit("query", [f"!once {tmp_path / 'met'} {fifo.order}"])
    fifo.wait_until_read()
    with ThreadPoolExecutor(1) as agents:
        other = agents.submit(pools.pool(B).rerank, "query", DOCUMENTS)
        until(lambda: states(pools).get("A") == "leaving")
        os.kill(fifo.pid, signal.SIGKILL)
        fifo.release()
        assert len(working.result(PATIENCE)) == 1, "its successor scored it"
        assert other.result(PATIENCE) == ranked("query", DOCUMENTS)
    assert states(pools) == {"B": "ready"}


def test_an_idle_worker_killed_as_it_is_told_to_leave(make_pools: MakePools, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = make_pools(SIZE, workers=1)
    pools.pool(A).start()
    [worker] = pools.pool(A).workers()
    close = _model_manager.Manager._close_pool

    def kill_and_close(manager: Any, tenant: Any, *, drain: bool) -> None:
        os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
        monkeypatch.undo()
        close(manager, tenant, drain=drain)

    monkeypatch.setattr(_model_manager.Manager, "_close_pool", kill_and_close)
    monkeypatch.setattr(_model_manager, "estimate_memory", lambda spec, workers, _: SIZE)
    assert pools.pool(B).rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


class TestWaiting:
    """For room, behind a model that works."""

    @pytest.fixture
    def pools(self, make_pools: MakePools, fifo: Fifo) -> Iterator[ModelPools]:
        pools = make_pools(SIZE)
        working = pools.pool(A).submit("query", [fifo.order])
        fifo.wait_until_read()
        yield pools
        fifo.release()
        working.result(PATIENCE)
        until(lambda: all(kept.model != "B" for kept in pools.stats().models))
        assert pools.stats().started == 1, "who has given up has nothing started"

    def test_a_request_s_own_timeout_ends_it(self, pools: ModelPools) -> None:
        for ask in (pools.pool(B).rerank, pools.pool(B).submit):
            with pytest.raises(RequestTimeoutError, match=r"the request waited 0\.02 s for B to be loaded") as caught:
                ask("query", DOCUMENTS, timeout=0.02)
            assert (caught.value.total, caught.value.timeout) == (10, 0.02)
        with pytest.raises(RequestTimeoutError):
            asyncio.run(pools.pool(B).arerank("query", DOCUMENTS, timeout=0.02))

    def test_a_partial_one_gets_what_there_is(self, pools: ModelPools) -> None:
        options: Any = {"timeout": 0.02, "on_timeout": "partial"}
        nothing = [(i, None) for i in range(10)]
        for found in (
            pools.pool(B).rerank("query", DOCUMENTS, **options),
            pools.pool(B).submit("query", DOCUMENTS, **options).result(PATIENCE),
            asyncio.run(pools.pool(B).arerank("query", DOCUMENTS, **options)),
        ):
            assert [(result.index, result.relevance_score) for result in found] == nothing

    def test_a_task_may_be_cancelled(self, pools: ModelPools) -> None:
        async def agent() -> None:
            task = asyncio.create_task(pools.pool(B).arerank("query", DOCUMENTS))
            while states(pools).get("B") != "waiting":
                await asyncio.sleep(0.005)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(agent())

    @pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
    def test_ctrl_c_ends_it(self, pools: ModelPools) -> None:
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                pools.pool(B).rerank("query", DOCUMENTS)
        finally:
            signal.signal(signal.SIGALRM, before)

    def test_a_close_ends_it(self, pools: ModelPools, fifo: Fifo) -> None:
        with ThreadPoolExecutor(2) as agents:
            asked = agents.submit(pools.pool(B).rerank, "query", DOCUMENTS)
            until(lambda: states(pools).get("B") == "waiting")
            closing = agents.submit(pools.close)
            with pytest.raises(PoolClosedError, match="the ModelPools are closed"):
                asked.result(PATIENCE)
            assert not closing.done(), "it drains"
            fifo.release()
            closing.result(PATIENCE)


def test_tasks_share_them(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)

    async def agent(number: int) -> None:
        pool = pools.pool((A, B, C)[number % 3])
        assert await pool.arerank(f"query {number}", DOCUMENTS) == ranked(f"query {number}", DOCUMENTS)
        assert (await pool.asubmit_pairs([("q", "d")])).tolist() == [score_of("q", "d")]

    async def all_agents() -> None:
        await asyncio.gather(*(agent(i) for i in range(30)))

    asyncio.run(all_agents())


def test_a_handle_that_is_closed_retires_its_pool_and_loads_it_again(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)
    pools.pool(A).close()
    with pools.pool(A) as pool:
        assert states(pools) == {"A": "ready"}
    assert pools.stats().models == ()
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    pool.close(drain=False)
    assert pools.stats().models == ()


def test_a_handle_that_is_closed_lets_others_finish(make_pools: MakePools, fifo: Fifo) -> None:
    pools = make_pools(SIZE)
    working = pools.pool(A).submit("query", [fifo.order])
    fifo.wait_until_read()
    with ThreadPoolExecutor(2) as agents:
        closing = agents.submit(pools.pool(A).close)
        until(lambda: states(pools) == {"A": "leaving"})
        late = agents.submit(pools.pool(A).rerank, "query", DOCUMENTS)
        until(lambda: sum(kept.waiting for kept in pools.stats().models) == 1)
        fifo.release()
        closing.result(PATIENCE)
        assert len(working.result(PATIENCE)) == 1
        assert late.result(PATIENCE) == ranked("query", DOCUMENTS)


@pytest.mark.parametrize("drain", [True, False])
def test_a_handle_that_is_closed_while_its_model_is_loaded(make_pools: MakePools, fifo: Fifo, drain: bool) -> None:
    pools = make_pools(SIZE, workers=1)
    pool = pools.pool(ModelSpec(fifo.order, loader="fakes:load_obeying"))
    with ThreadPoolExecutor(2) as agents:
        asked = agents.submit(pool.rerank, "query", DOCUMENTS)
        fifo.wait_until_read()
        closing = agents.submit(pool.close, drain=drain)
        if drain:
            until(lambda: pools._manager._retirements != [])
            fifo.release()
            assert asked.result(PATIENCE) == ranked("query", DOCUMENTS), "it had asked before"
        else:
            with pytest.raises(PoolClosedError):
                asked.result(PATIENCE)
            fifo.release()
        closing.result(PATIENCE)
    assert pools.stats().models == ()


def test_copies_are_the_same_and_none_is_pickled(make_pools: MakePools) -> None:
    pools = make_pools(SIZE)
    assert copy.copy(pools) is copy.deepcopy({"pools": pools})["pools"] is pools
    pool = pools.pool(A)
    assert copy.deepcopy(pool) is pool
    for whole in (pools, pool):
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(whole)


def test_a_handle_closed_for_so_long_fails_what_is_left(make_pools: MakePools, fifo: Fifo) -> None:
    pools = make_pools(SIZE, workers=1)
    working = pools.pool(A).submit("query", [fifo.order])
    fifo.wait_until_read()
    pools.pool(A).close(timeout=0.05)
    with pytest.raises(PoolClosedError):
        working.result(PATIENCE)
    fifo.release()


def test_a_request_that_ends_in_any_way_lets_go_of_its_pool(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)
    three = ModelSpec("three", loader="fakes:load_three_labels")
    with pytest.raises(ValueError, match="three gives 3 scores a pair") as kept:
        pools.pool(three).rerank("query", DOCUMENTS)
    assert [one.requests for one in pools.stats().models] == [0]
    future: Future[Any] = pools.pool(A).submit_pairs([("q", "!raise no")])
    with pytest.raises(RerankError):
        future.result(PATIENCE)
    cancelled = pools.pool(three).submit_pairs([("q", "d")] * 1000)
    if cancelled.cancel():
        with pytest.raises(CancelledError):
            cancelled.result()
    until(lambda: [one.requests for one in pools.stats().models] == [0, 0])
    del kept


def test_closed_ones_take_nothing_more(make_pools: MakePools) -> None:
    never_used = make_pools(SIZE)
    never_used.close()
    with make_pools(2 * SIZE) as pools:
        pool = pools.pool(A)
        pool.start()
    pools.close()
    for closed in (pool, pools.pool(B), never_used.pool(A)):
        for call in (closed.start, lambda closed=closed: closed.rerank("q", DOCUMENTS)):
            with pytest.raises(PoolClosedError, match="the ModelPools are closed"):
                call()
        closed.close()
    assert pools.stats().models == ()


def test_they_end_with_the_last_who_holds_them_or_a_pool_of_them(make_pools: MakePools, sizes: dict[str, int]) -> None:
    pool = ModelPools(SIZE, devices="cpu", isolation="thread").pool(A)
    gc.collect()
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    manager = weakref.ref(pool._manager)  # type: ignore[attr-defined]
    thread = next(one for one in threading.enumerate() if one.name == "mp_rerank-models")
    del pool
    gc.collect()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    del thread
    until(lambda: gc.collect() >= 0 and manager() is None)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_has_none(make_pools: MakePools) -> None:
    pools = make_pools(SIZE)
    pool = pools.pool(A)
    pool.start()
    child = os.fork()
    if child == 0:
        try:
            pool.close()
            pools.close()
            pool.rerank("query", DOCUMENTS)
        except PoolClosedError as error:
            os._exit(0 if "a fork of it needs ModelPools of its own" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_no_lock_is_held_while_a_caller_s_code_can_run(make_pools: MakePools) -> None:
    """A signal handler, or a finalizer: at whatever moment of a call, it may make the same call."""
    pools = make_pools(2 * SIZE)
    pools.pool(A).start()

    def call() -> None:
        leased = pools.pool(A)._begin()  # type: ignore[attr-defined]
        leased.started.wait(PATIENCE)
        leased.give_up()

    moment = 1
    while at_moment(call, moment, call):
        moment += 1
    assert moment > 20
    assert [kept.requests for kept in pools.stats().models] == [0]


def test_threads_of_pools_do_not_wait_for_them(make_pools: MakePools) -> None:
    pools = make_pools(SIZE)
    found: list[object] = []

    def ask() -> None:
        try:
            pools.pool(A).rerank("query", DOCUMENTS)
        except RuntimeError as error:
            found.append(error)
        pools.pool(A).close()
        found.append(pools.stats())

    thread = threading.Thread(target=ask, name="mp_rerank-plan")
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert "would wait for itself" in str(found[0])
    assert len(found) == 2


def test_without_workers_there_are_as_many_as_half_of_the_bound_holds(
    make_pools: MakePools, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SimpleNamespace(seats=[None] * 16)
    monkeypatch.setattr(_model_manager, "make_plan", lambda config, spec: plan)
    config = make_pools(SIZE)._config
    process = replace(config, isolation="process")
    for limit, workers in ((100 * SIZE, 16), (8 * SIZE, 4), (SIZE, 1), (1, 1)):
        fitted = _model_manager._fit(FAKE, process, limit)
        assert (fitted.workers, fitted.size) == (workers, workers * SIZE)
        assert fitted.config.workers == (None if workers == 16 else workers)
    asked = replace(process, workers=16)
    assert _model_manager._fit(FAKE, asked, SIZE).config is asked


def worker(pss: int | None, uss: int | None, mapped: int = 0, pid: int = 1) -> WorkerMemory:
    return WorkerMemory(pid, 1000, uss, pss, 70, mapped)


@pytest.mark.parametrize(
    ("workers", "seats", "size"),
    [
        ([worker(30, 20), worker(40, 20)], 2, 70),
        ([worker(None, 20, 50), worker(None, 30, 50)], 2, 100),
        ([worker(None, None, 50)], 1, 1000),
        ([worker(30, 20)], 3, 90),
        ([worker(30, 20, pid=os.getpid())], 1, 70),
        ([], 2, 0),
    ],
    ids=["pss", "no pss", "nothing but rss", "some are starting anew", "a thread", "none"],
)
def test_shared_pages_count_once(workers: list[WorkerMemory], seats: int, size: int) -> None:
    pool: Any = SimpleNamespace(
        memory=lambda: PoolMemory(worker(1, 1), tuple(workers)),
        workers=lambda: [SimpleNamespace(state="ready")] * seats + [SimpleNamespace(state="failed")],
    )
    assert _model_manager._measure(pool) == size


def test_a_real_process_is_measured(make_pool: Callable[..., RerankerPool]) -> None:
    with make_pool(workers=1) as pool:
        [memory] = pool.memory().workers
        assert 2**20 < _model_manager._measure(pool) <= memory.rss + 2**20


def test_a_shared_pool_comes_from_them_when_it_is_told_to(make_pools: MakePools) -> None:
    pools = make_pools(2 * SIZE)
    pool = shared_pool(A, pools=pools)
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert states(pools) == {"A": "ready"}
    shared_pool(A, "cpu", pools=pools, isolation="thread").start()
    assert pools.stats().started == 1
    shared_pool(A, "cpu", pools=pools, batch_tokens=64).start()
    assert pools.stats().started == 2


def test_mistakes_are_named_where_they_are_made(make_pools: MakePools) -> None:
    with pytest.raises(ValueError, match="memory: bytes, or a size such as '8GiB'"):
        ModelPools("much")
    with pytest.raises(TypeError, match="has no option wokers"):
        ModelPools("8GiB", wokers=1)
    pools = make_pools("8GiB")
    assert pools.stats().memory_limit == 8 * 2**30
    with pytest.raises(TypeError, match="has no option wokers"):
        pools.pool(A, wokers=1)
    with pytest.raises(ValueError, match=r"there is no folder '\./nothing'"):
        pools.pool("./nothing")
    with pytest.raises(TypeError, match=r"documents\[0\]: a string is needed"):
        pools.pool(A).rerank("query", [7])  # type: ignore[list-item]
    with pytest.raises(RerankError, match=r"ask pools\.pool\(\.\.\.\) for the other one"):
        pools.pool(A).reload(B)
    assert pools.stats().models == ()


def test_a_model_is_loaded_anew_in_its_place(make_pools: MakePools) -> None:
    pools = make_pools("8GiB")
    pool = pools.pool(A)
    pool.reload(A)  # it was not loaded: that is all
    assert pool.stats().reloads == 0
    pool.reload(A)
    assert pool.stats().reloads == 1
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    until(lambda: [kept.requests for kept in pools.stats().models] == [0])
    assert pools.stats().started == 1


def test_streams_and_callers_hold_their_pool_too(make_pools: MakePools, fifo: Fifo) -> None:
    pools = make_pools(SIZE)
    caller = pools.pool(A).for_caller("agent")
    assert caller.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert "agent" in pools.pool(A).stats().callers

    async def all_of() -> dict[int, Any]:
        return {index: score async for index, score in pools.pool(B).astream("query", DOCUMENTS)}

    for found in (dict(pools.pool(A).stream("query", DOCUMENTS)), asyncio.run(all_of())):
        assert [found[i] for i in range(10)] == [score_of("query", document) for document in DOCUMENTS]
    with pools.pool(A).stream("query", [fifo.order]) as stream:
        fifo.wait_until_read()
        assert [kept.requests for kept in pools.stats().models if kept.model == "A"] == [1]
        fifo.release()
        assert len(list(stream)) == 1
    until(lambda: all(kept.requests == 0 for kept in pools.stats().models))
