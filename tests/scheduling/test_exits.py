"""Why was a worker restarted? Each seat tells how its last worker ended; ``stats()`` counts; a logger says it."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import PATIENCE, ranked, until
from standing import House

from mp_rerank import ModelSpec, RerankerPool, WorkerExit
from mp_rerank._workers.slot import Exited

MakePool = Callable[..., RerankerPool]
MakeOne = Callable[..., tuple[WorkerExit, RerankerPool]]


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


def last_exit(pool: RerankerPool) -> WorkerExit:
    """How the first worker to end did, once there is one in its place."""
    until(lambda: pool.workers()[0].last_exit is not None and pool.workers()[0].state == "ready")
    found = pool.workers()[0].last_exit
    assert found is not None
    assert time.time() - PATIENCE < found.at <= time.time()
    return found


def test_the_first_worker_has_nobody_before_it(make_pool: MakePool) -> None:
    with make_pool() as pool:
        pool.rerank("query", documents(20))
        assert [info.last_exit for info in pool.workers()] == [None, None]
        assert pool.stats().exits == {}


@pytest.mark.parametrize(
    ("death", "reason", "exit_code", "name"),
    [
        ("!os._exit 5", "crashed", 5, ""),
        ("!signal SIGSEGV", "crashed", -11, "SIGSEGV"),
        ("!lose-device", "device_lost", 75, ""),
    ],
)
def test_one_that_died_with_a_slice(
    make_pool: MakePool, tmp_path: Path, death: str, reason: str, exit_code: int, name: str
) -> None:
    with make_pool(workers=1) as pool:
        pool.rerank("query", [f"!once {tmp_path / 'mark'} {death}"])
        found = last_exit(pool)
        assert (found.reason, found.exit_code, found.signal) == (reason, exit_code, name)
        assert pool.stats().exits == {reason: 1}


def test_one_that_died_with_nothing_to_do(make_pool: MakePool) -> None:
    """As by the system, for its memory."""
    with make_pool(workers=1) as pool:
        pid = pool.workers()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        found = last_exit(pool)
        assert (found.reason, found.exit_code, found.signal) == ("idle_death", -9, "SIGKILL")


def test_one_that_hung(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool(workers=1, hang_timeout=0.2) as pool:
        pool.rerank("query", [f"!once {tmp_path / 'mark'} !hang"])
        found = last_exit(pool)
        assert (found.reason, found.signal) == ("hung", "SIGKILL")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"max_slices_per_worker": 1}, "recycled_slices"), ({"max_memory_per_worker": 1}, "recycled_memory")],
)
def test_one_that_was_recycled(make_pool: MakePool, options: dict[str, int], reason: str) -> None:
    with make_pool(workers=1, **options) as pool:
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))
        found = last_exit(pool)
        assert (found.reason, found.exit_code, found.signal) == (reason, None, "")
        assert pool.stats().exits[reason] >= 1


def test_one_whose_model_was_replaced(make_pool: MakePool) -> None:
    with make_pool() as pool:
        pool.reload(ModelSpec("salted", loader="fakes:load_salted"))
        until(lambda: all(info.last_exit is not None for info in pool.workers()))
        assert {info.last_exit.reason for info in pool.workers() if info.last_exit} == {"reloaded"}
        assert pool.stats().exits == {"reloaded": 2}


def test_each_end_and_each_restart_is_logged(
    make_pool: MakePool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="mp_rerank.pool"), make_pool(workers=1) as pool:
        pool.rerank("query", [f"!once {tmp_path / 'mark'} !os._exit 5"])
        last_exit(pool)
    said = [record.getMessage() for record in caplog.records if record.name == "mp_rerank.pool"]
    assert "worker 0 on cpu, generation 1, ended: crashed, exit code 5" in said
    assert "worker 0 on cpu: starting generation 2; the one before ended: crashed" in said


def test_what_a_worker_was_no_more_there_for_is_not_blamed_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """All workers were killed a moment ago: a request goes to one after the other, and none has seen it."""
    house = House(monkeypatch, 5, max_attempts=1)
    for worker in house.made:
        worker.get_ready()
        worker.score = broken  # type: ignore[method-assign]
    request = house.submit(1)
    assert house.states == "restarting " * 4 + "restarting"
    for slot in house.deployment.slots:
        house.deployment.handle(Exited(slot, slot.generation, -9), house.now)
    house.step()
    for worker in house.made[5:]:
        worker.get_ready()
    house.step()
    house.finish_all()
    assert request.future.result(0) == [0.0]
    assert house.counts.exits == {"crashed": 5}


def broken(*_: object) -> NoReturn:
    raise BrokenExecutor("a process in the pool was terminated abruptly")
