"""Workers forked by a server: it is started once, survives its children's deaths, and they survive its own.

What a pool promises is tested over them in ``test_contract``, that they leave with their parent in ``test_shutdown``.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

import psutil
import pytest
from conftest import ranked, until

from mp_rerank import RerankerPool

MakePool = Callable[..., RerankerPool]

DOCUMENTS = [f"document {i}" for i in range(50)]


@pytest.fixture
def forking(make_pool: MakePool, fork_server: str) -> Callable[..., RerankerPool]:
    def make(**options: object) -> RerankerPool:
        return make_pool(start_method=fork_server, **options).start()

    return make


def server_of(pool: RerankerPool) -> psutil.Process:
    (pid,) = {psutil.Process(worker.pid).ppid() for worker in pool.workers()}
    return psutil.Process(pid)


def test_one_server_forks_the_workers_of_every_pool(forking: Callable[..., RerankerPool]) -> None:
    first, second = forking(), forking(workers=1)
    assert server_of(first) == server_of(second)
    assert server_of(first).ppid() == os.getpid()
    first.close()
    assert second.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_a_worker_that_dies_is_forked_anew_and_its_signal_is_told(forking: Callable[..., RerankerPool]) -> None:
    pool = forking(max_restarts=0, workers=1)
    server = server_of(pool)
    os.kill(pool.workers()[0].pid, signal.SIGSEGV)  # type: ignore[arg-type]
    until(lambda: pool.stats().crashes == 1)
    until(lambda: pool.workers()[0].state in ("ready", "failed"))
    with pytest.raises(Exception, match="SIGSEGV"):
        pool.rerank("query", DOCUMENTS)
    assert server.is_running()


def test_a_death_in_the_middle_loses_nothing(forking: Callable[..., RerankerPool]) -> None:
    pool = forking()
    for _ in range(5):
        futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
        for worker in pool.workers():
            if worker.pid is not None:
                with contextlib.suppress(psutil.NoSuchProcess):  # killed in the round before, as is to be noticed yet
                    psutil.Process(worker.pid).kill()
        assert [future.result() for future in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]


def test_a_server_that_dies_takes_nothing_along(forking: Callable[..., RerankerPool]) -> None:
    """Its children's exit codes are lost with it, so they pass for dead: they must then really be."""
    pool = forking()
    server, before = server_of(pool), [psutil.Process(worker.pid) for worker in pool.workers()]
    futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
    server.kill()
    assert [future.result() for future in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
    until(lambda: all(worker.state == "ready" and worker.generation == 2 for worker in pool.workers()))
    assert server_of(pool) != server
    _, alive = psutil.wait_procs(before, timeout=30)
    assert not alive
