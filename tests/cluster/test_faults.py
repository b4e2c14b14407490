"""Workers of a Dask cluster join, leave, hang and die, and so does its scheduler: real processes, really killed."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import PATIENCE, Processes, need_dask, workers_of
from conftest import Fifo, ranked, until
from fakes import score_of

from mp_rerank import ClusterError, ModelLoadError, ModelSpec, RerankerPool, WorkerCrashedError

MakePool = Callable[..., RerankerPool]

DOCUMENTS = [f"document {i}" for i in range(200)]
# What a worker or a scheduler may be away: a restart takes 3 s on a busy machine.
AWAY = 20.0


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Processes]:
    """A scheduler; the test starts its workers."""
    need_dask()
    cluster = Processes(tmp_path)
    yield cluster
    cluster.close()


@pytest.fixture
def make_cluster_pool(make_pool: MakePool, cluster: Processes) -> MakePool:
    def make(*args: Any, **options: Any) -> RerankerPool:
        return make_pool(*args, cluster=cluster.address, **{"cluster_timeout": AWAY, **options})

    return make


def places(pool: RerankerPool, state: str = "ready") -> list[str]:
    return [info.place for info in pool.workers() if info.state == state]


def check(pool: RerankerPool, query: str = "query") -> None:
    """The pool scores, rightly."""
    assert pool.submit(query, DOCUMENTS).result(PATIENCE) == ranked(query, DOCUMENTS)


def nanny_child(nanny: psutil.Popen) -> psutil.Process:
    """The worker that a nanny watches, once it has one."""
    found: list[psutil.Process] = []

    def look() -> bool:
        found[:] = workers_of(nanny)
        return len(found) == 1

    until(look)
    return found[0]


def test_a_worker_that_joins_later_has_a_seat(make_cluster_pool: MakePool, cluster: Processes) -> None:
    cluster.worker()
    with make_cluster_pool() as pool:
        assert len(places(pool)) == 1
        cluster.worker("--nworkers", "2")
        until(lambda: len(places(pool)) == 3)
        check(pool)


def test_a_killed_worker_is_replaced_by_its_nanny_and_keeps_its_seat(
    make_cluster_pool: MakePool, cluster: Processes, fifo: Fifo
) -> None:
    nanny = cluster.worker()
    with make_cluster_pool() as pool:
        [place] = places(pool)
        # Two requests: a slice that runs, and one that waits behind it.
        running = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        waiting = pool.submit("query", DOCUMENTS)
        nanny_child(nanny).kill()
        until(lambda: pool.stats().crashes == 1)
        fifo.release()
        fifo.wait_until_read()  # the worker after it has the same document
        fifo.release()
        assert running.result(PATIENCE)[0].index == 0
        assert waiting.result(PATIENCE) == ranked("query", DOCUMENTS)
        assert places(pool) == [place]
        [info] = pool.workers()
        assert info.generation == 2
        assert info.last_exit is not None
        assert info.last_exit.reason == "crashed"


def test_a_poison_document_fails_alone(make_cluster_pool: MakePool, cluster: Processes) -> None:
    cluster.worker("--nworkers", "2")
    with make_cluster_pool(max_attempts=2) as pool:
        poisoned = pool.submit("query", [*DOCUMENTS, "!signal SIGKILL"])
        others = [pool.submit(f"query {i}", DOCUMENTS) for i in range(5)]
        with pytest.raises(WorkerCrashedError, match="document 200 ended 2 workers") as caught:
            poisoned.result(PATIENCE)
        assert caught.value.document_index == 200
        assert [other.result(PATIENCE) for other in others] == [ranked(f"query {i}", DOCUMENTS) for i in range(5)]


def test_what_was_scored_just_before_a_death_is_not_blamed(
    make_cluster_pool: MakePool, cluster: Processes, fifo: Fifo
) -> None:
    cluster.worker()
    with make_cluster_pool(max_attempts=1) as pool:
        first = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        second = pool.submit("query", ["!signal SIGKILL"])
        pool.stats()  # by now it has been sent, and waits behind the first
        fifo.release()
        assert first.result(PATIENCE)[0].index == 0
        with pytest.raises(WorkerCrashedError, match="document 0 ended 1 workers"):
            second.result(PATIENCE)


def test_a_worker_that_is_retired_finishes_its_slice_and_nothing_is_blamed(
    make_cluster_pool: MakePool, cluster: Processes, fifo: Fifo
) -> None:
    cluster.worker()
    with make_cluster_pool(max_attempts=1) as pool:
        running = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        waiting = pool.submit("query", DOCUMENTS)
        cluster.worker()
        until(lambda: len(places(pool)) == 2)
        leaving = places(pool)[0]
        retirement = Retirement(cluster, leaving)
        until(lambda: "Stopping worker" in cluster.log())
        fifo.release()
        retirement.join()
        assert running.result(PATIENCE)[0].index == 0
        assert waiting.result(PATIENCE) == ranked("query", DOCUMENTS)
        until(lambda: leaving not in [info.place for info in pool.workers()])
        assert pool.stats().exits == {"left": 1}
        assert pool.stats().crashes == 0
        check(pool)


class Retirement(threading.Thread):
    """Another process asks the scheduler to retire the worker of a nanny."""

    def __init__(self, cluster: Processes, nanny: str) -> None:
        super().__init__()
        code = (
            "import sys; from distributed import Client\n"
            "with Client(sys.argv[1]) as client:\n"
            "    workers = client.scheduler_info(n_workers=-1)['workers']\n"
            "    client.retire_workers([a for a, info in workers.items() if info['nanny'] == sys.argv[2]])\n"
        )
        self.command = [sys.executable, "-c", code, cluster.address, nanny]
        self.start()

    def run(self) -> None:
        subprocess.run(self.command, check=True, timeout=PATIENCE)


def test_a_killed_nanny_takes_its_seat_along(make_cluster_pool: MakePool, cluster: Processes) -> None:
    first, _ = cluster.worker(), cluster.worker()
    cluster.wait_for(2)
    with make_cluster_pool(cluster_timeout=3.0) as pool:
        until(lambda: len(places(pool)) == 2)
        futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
        first.kill()
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
        until(lambda: len(pool.workers()) == 1)
        check(pool)


def test_a_worker_that_is_stopped_is_given_up_and_comes_back_later(
    make_cluster_pool: MakePool, cluster: Processes, fifo: Fifo
) -> None:
    stopped, _ = cluster.worker(), cluster.worker()
    cluster.wait_for(2)
    with make_cluster_pool(cluster_timeout=3.0) as pool:
        until(lambda: len(places(pool)) == 2)
        process = nanny_child(stopped)
        process.suspend()
        check(pool)
        futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
        until(lambda: len(pool.workers()) == 1)
        process.resume()
        until(lambda: len(places(pool)) == 2)
        check(pool)


def test_a_model_that_hangs_is_ended_with_its_process(
    make_cluster_pool: MakePool, cluster: Processes, tmp_path: Path
) -> None:
    cluster.worker()
    with make_cluster_pool(hang_timeout=0.5) as pool:
        documents = [*DOCUMENTS, f"!once {tmp_path / 'mark'} !hang"]
        assert pool.submit("query", documents).result(PATIENCE) == ranked("query", documents)
        assert pool.stats().exits == {"hung": 1}


def test_a_lost_scheduler_is_an_error_after_a_while(make_cluster_pool: MakePool, cluster: Processes) -> None:
    cluster.worker()
    cluster.wait_for(1)
    pool = make_cluster_pool(cluster_timeout=2.0).start()
    cluster.scheduler.kill()

    def ask() -> None:
        while True:  # Dask's workers end themselves a moment after their scheduler
            pool.submit("query", DOCUMENTS).result(PATIENCE)

    with pytest.raises(ClusterError, match=r"lost: no scheduler answers"):
        ask()


def test_with_seats_on_this_machine_the_pool_goes_on_without_its_cluster(
    make_cluster_pool: MakePool, cluster: Processes
) -> None:
    cluster.worker()
    cluster.wait_for(1)
    with make_cluster_pool(workers=1, cluster_timeout=2.0) as pool:
        until(lambda: len(places(pool)) == 2)
        futures: list[Future[Any]] = [pool.submit(f"query {i}", DOCUMENTS) for i in range(50)]
        for process in (cluster.scheduler, *cluster.scheduler.children()):
            process.send_signal(signal.SIGKILL)
        until(lambda: places(pool) == [""])
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(50)]
        check(pool)


def test_workers_with_another_version_are_refused_by_name(
    make_cluster_pool: MakePool, cluster: Processes, tmp_path: Path
) -> None:
    preload = tmp_path / "other_version.py"
    preload.write_text("import mp_rerank\nmp_rerank.__version__ = '0.0.1'\n")
    cluster.worker("--preload", str(preload))
    with pytest.raises(ClusterError, match=r"worker tcp://.* cannot be used: it has mp_rerank 0\.0\.1"):
        make_cluster_pool().start()


def test_a_worker_without_the_package_is_refused_and_the_others_are_used(
    make_cluster_pool: MakePool, cluster: Processes, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    cluster.worker()
    hide = tmp_path / "hide.py"
    hide.write_text("import sys\nsys.modules['mp_rerank'] = None\n")
    with make_cluster_pool() as pool:
        cluster.worker("--preload", str(hide))
        until(lambda: "cannot be used" in caplog.text)
        assert "mp_rerank" in caplog.text
        assert len(places(pool)) == 1
        check(pool)


def test_a_model_that_cannot_be_loaded_there_fails_the_start(
    make_cluster_pool: MakePool, cluster: Processes, tmp_path: Path
) -> None:
    cluster.worker()
    with pytest.raises(ModelLoadError, match="FileNotFoundError"):
        make_cluster_pool(ModelSpec(str(tmp_path), loader="fakes:load_from_folder")).start()


def test_no_scheduler_is_an_error_after_a_while(make_pool: MakePool) -> None:
    need_dask()
    with pytest.raises(ClusterError, match=r"the Dask cluster at tcp://127\.0\.0\.1:1 is lost: no scheduler answers"):
        make_pool(cluster="tcp://127.0.0.1:1", cluster_timeout=0.5).start()


def test_a_cluster_without_workers_is_an_error_after_a_while(make_cluster_pool: MakePool) -> None:
    with pytest.raises(ClusterError, match=r"has had no worker that could be reached for 0\.5 s"):
        make_cluster_pool(cluster_timeout=0.5).start()


def test_a_reload_loads_in_one_half_of_the_seats_while_the_other_scores(
    make_cluster_pool: MakePool, cluster: Processes, fifo: Fifo, tmp_path: Path
) -> None:
    at_the_gate = tmp_path / "gate.pid"
    at_the_gate.touch()

    def stands_there(before: str) -> None:
        until(lambda: at_the_gate.read_text() not in ("", before))
        fifo.wait_until_read()

    cluster.worker("--nworkers", "2")
    with make_cluster_pool() as pool:
        until(lambda: len(places(pool)) == 2)
        reload = threading.Thread(
            target=pool.reload, args=(ModelSpec(fifo.order, loader="fakes:load_after_gate"),), daemon=True
        )
        reload.start()
        before = ""
        for _ in range(2):
            stands_there(before)  # one seat, which loads the new model
            before = at_the_gate.read_text()
            for i in range(10):
                check(pool, f"query {i}")
            fifo.release()
        reload.join(PATIENCE)
        assert len(places(pool)) == 2
        for i in range(10):
            [result] = pool.rerank(f"query {i}", ["document"])
            assert result.relevance_score == score_of(f"salted query {i}", "document")
        assert pool.stats().crashes == 0
