"""No more workers than there is work for: they start when work waits, and rest when there has been none for long."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest
from conftest import PATIENCE, START_METHODS, Fifo, ranked, until
from standing import House

from mp_rerank import ModelSpec, RerankerPool
from mp_rerank._workers.slot import Exited

MakePool = Callable[..., RerankerPool]


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> Callable[..., House]:
    return lambda *arguments, **options: House(monkeypatch, *arguments, **options)


def test_all_workers_start_and_stay_where_nothing_else_is_asked_for(house: Callable[..., House]) -> None:
    one = house(3)
    for worker in one.made:
        worker.get_ready()
    assert one.deployment.ready
    one.step(1e9)
    assert one.states == "ready ready ready"
    assert one.deployment.wake_at() is None


def test_a_pool_starts_with_the_least_and_grows_by_what_waits_beside_what_is_sent(house: Callable[..., House]) -> None:
    one = house(4, min_workers=1)
    [first] = one.made
    first.get_ready()
    assert one.deployment.ready
    assert one.states == "ready resting resting resting"
    one.submit(2)
    assert len(one.made) == 1, "it has both: one to score, one to wait"
    one.submit(2)
    assert one.states == "ready starting starting resting", "for two slices, two more"
    for _ in range(5):
        one.step()
    assert len(one.made) == 3, "who is on the way is counted"
    for worker in one.made[1:]:
        worker.get_ready()
    one.step(0.09)  # soon after each has its first slice, the second is sent
    assert [len(worker.scoring) for worker in one.made] == [2, 1, 1]
    assert one.deployment.queue.waiting_tokens == 0
    one.submit(100)
    assert one.states == "ready ready ready starting", "and never more than there are seats"
    one.finish_all()
    assert one.counts.restarts == 0


def test_the_idle_are_retired_after_their_time_and_not_before(house: Callable[..., House]) -> None:
    one = house(3, idle_timeout=10.0, min_workers=1)
    one.made[0].get_ready()
    one.submit(10)
    for worker in one.made[1:]:
        worker.get_ready()
    one.step()
    assert one.states == "ready ready ready"
    assert one.deployment.wake_at() is not None
    one.step(100.0)
    assert one.states == "ready ready ready", "all have work"
    one.finish_all()
    assert one.deployment.wake_at() == 110.0
    one.step(109.9)
    assert one.states == "ready ready ready"
    one.step(110.0)
    assert one.states == "ready resting resting"
    assert [worker.retired for worker in one.made] == [False, True, True]
    assert one.counts.exits == {"idle_timeout": 2}
    assert one.deployment.wake_at() is None, "the last one stays"


def test_work_that_comes_and_goes_starts_and_ends_no_worker_within_its_time(house: Callable[..., House]) -> None:
    one = house(2, idle_timeout=10.0)
    one.made[0].get_ready()
    one.submit(10)
    one.made[1].get_ready()
    one.finish_all()
    for second in range(1, 200):
        one.step(5.0 * second)
        one.submit(10)
        one.finish_all()
    assert len(one.made) == 2
    assert one.states == "ready ready"


def test_a_small_request_now_and_then_keeps_one_worker_and_not_all(house: Callable[..., House]) -> None:
    one = house(3, idle_timeout=10.0)
    one.made[0].get_ready()
    one.submit(10)
    for worker in one.made[1:]:
        worker.get_ready()
    one.finish_all()
    for second in range(1, 20):
        one.step(5.0 * second)
        one.submit(1)
        one.finish_all()
    assert one.states == "ready resting resting"


def test_a_pool_may_sleep_and_is_woken_by_work(house: Callable[..., House]) -> None:
    one = house(2, idle_timeout=10.0, min_workers=0)
    one.made[0].get_ready()
    one.step(10.0)
    assert one.states == "resting resting"
    one.submit(1)
    assert one.states == "restarting resting"
    one.made[1].get_ready()
    one.step()
    one.finish_all()
    assert one.counts.completed == 0  # the dispatcher's to count
    assert not one.deployment.queue.live
    assert one.counts.restarts == 0, "it replaces nobody"


def test_a_seat_that_fails_is_made_up_for_by_one_that_rests(house: Callable[..., House]) -> None:
    one = house(3, min_workers=2, max_restarts=0)
    for worker in one.made:
        worker.get_ready()
    one.step()
    assert one.states == "ready ready resting"
    one.deployment.handle(Exited(one.deployment.slots[1], 1, -9), 1.0)
    one.step(1.0)
    assert one.states == "ready failed starting"
    assert one.deployment.failure is None


def test_only_the_last_seat_s_failure_is_the_pool_s(house: Callable[..., House]) -> None:
    one = house(2, min_workers=1, max_restarts=0)
    one.made[0].get_ready()
    one.deployment.handle(Exited(one.deployment.slots[0], 1, -9), 1.0)
    assert one.deployment.failure is None
    one.submit(1)
    assert one.states == "failed starting"
    one.deployment.handle(Exited(one.deployment.slots[1], 1, -9), 1.0)
    assert one.deployment.failure is not None


@pytest.mark.parametrize("start_method", ["spawn", *START_METHODS[2:]])
def test_real_workers_rest_and_come_back(make_pool: MakePool, fifo: Fifo, start_method: str) -> None:
    options = {"start_method": start_method, "idle_timeout": 0.2, "min_workers": 0, "slice_tokens": 20}
    pool = make_pool(workers=2, **options).start()
    documents = [f"document {i}" for i in range(200)]
    for _ in range(2):
        held = pool.submit("query", [fifo.order, *documents])
        fifo.wait_until_read()
        until(lambda: all(worker.state == "ready" for worker in pool.workers()))
        fifo.release()
        assert held.result(PATIENCE) == ranked("query", [fifo.order, *documents])
        until(lambda: all(worker.state == "resting" for worker in pool.workers()))
        assert all(worker.pid is None for worker in pool.workers())
    assert pool.stats().exits == {"idle_timeout": 4}
    assert pool.stats().restarts == pool.stats().crashes == 0
    if start_method == "fork-model":  # all that is left of a pool that sleeps
        [template] = pool.memory().templates
        until(lambda: not psutil.Process(template.pid).children())


def test_a_reload_of_a_pool_that_rests(make_pool: MakePool) -> None:
    pool = make_pool(workers=3, min_workers=1).start()
    assert [worker.state for worker in pool.workers()] == ["ready", "resting", "resting"]
    pool.reload(ModelSpec("other", loader="fakes:load_salted"))
    assert [worker.state for worker in pool.workers()] == ["ready", "resting", "resting"]
    assert pool.rerank("query", ["document"]) != ranked("query", ["document"])
