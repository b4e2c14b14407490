"""Workers forked by a template that has loaded the model: it loads once, they go on without it, and it is made anew.

What a pool promises is tested over them in ``test_contract``; crashes and ways out over them by ``--start-method``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, START_METHODS, Fifo, ranked, until

from mp_rerank import ModelLoadError, ModelSpec, RerankerPool, WorkerCrashedError
from mp_rerank._planning.plan import Plan, Seat
from mp_rerank._scheduling import dispatcher
from mp_rerank._workers import child

pytestmark = pytest.mark.skipif("fork-model" not in START_METHODS, reason="of Linux")

MakePool = Callable[..., RerankerPool]
DOCUMENTS = [f"document {i}" for i in range(50)]


@pytest.fixture
def forking(make_pool: MakePool) -> MakePool:
    def make(model: str | ModelSpec = "fakes:load", **options: object) -> RerankerPool:
        spec = ModelSpec("fake", loader=model) if isinstance(model, str) else model
        return make_pool(spec, start_method="fork-model", **options).start()

    return make


class Notes:
    """A file in which a fake model notes each time that it is loaded; what loads it so."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._path = path
        self.spec = ModelSpec(f"!note {path}", loader="fakes:load_obeying")

    @property
    def loads(self) -> int:
        return len(self._path.read_text())


@pytest.fixture
def notes(tmp_path: Path) -> Notes:
    return Notes(tmp_path / "notes")


def templates(pool: RerankerPool) -> set[psutil.Process]:
    return {parent for w in pool.workers() if w.pid is not None and (parent := psutil.Process(w.pid).parent())}


def template(pool: RerankerPool) -> psutil.Process:
    [found] = templates(pool)
    return found


def test_the_model_is_loaded_once_for_all_workers_and_those_after_them(forking: MakePool, notes: Notes) -> None:
    pool = forking(notes.spec, workers=3)
    assert template(pool).ppid() == os.getpid()
    for generation in (2, 3):
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        until(lambda: pool.workers()[0].generation == generation and pool.workers()[0].state == "ready")  # noqa: B023
        last = pool.workers()[0].last_exit
        assert last is not None
        assert last.signal == "SIGKILL"
    assert notes.loads == 1
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_workers_go_on_without_the_template_and_a_new_one_is_there_for_the_next(
    forking: MakePool, notes: Notes
) -> None:
    pool = forking(notes.spec)
    first, before = template(pool), pool.workers()
    futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
    first.kill()
    assert [future.result() for future in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
    assert [w.pid for w in pool.workers()] == [w.pid for w in before]
    until(lambda: notes.loads == 2)  # made anew before anybody needs it
    assert before[0].pid is not None
    psutil.Process(before[0].pid).kill()
    until(lambda: pool.workers()[0].generation == 2 and pool.workers()[0].state == "ready")
    assert pool.workers()[1].pid == before[1].pid
    assert notes.loads == 2
    last = pool.workers()[0].last_exit
    assert last is not None
    assert (last.reason, last.exit_code) == ("idle_death", None), "who knew its exit code is gone"
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_a_template_that_is_killed_again_and_again_is_not_made_anew_for_ever(forking: MakePool, notes: Notes) -> None:
    pool = forking(notes.spec, workers=1)
    for loads in (1, 2, 3, 4):
        until(lambda: len(pids(pool)) == 1 and notes.loads == loads)  # noqa: B023
        [pid] = pids(pool)
        process = psutil.Process(pid)
        until(lambda: process.num_threads() == 1 and len(pids(pool)) == 1)  # noqa: B023
        serving(pool)
        process.kill()
        until(lambda: pids(pool) != [pid])  # noqa: B023
    assert pids(pool) == []
    worker = pool.workers()[0].pid
    assert worker is not None
    psutil.Process(worker).kill()
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert notes.loads == 5, "for the worker that needs it"


def pids(pool: RerankerPool) -> list[int]:
    return [template.pid for template in pool.memory().templates]


def serving(pool: RerankerPool) -> None:
    """Wait until the template has loaded the model."""
    [found] = deployment_of(pool)._templates._templates.values()
    found._run.settled.wait(PATIENCE)


def deployment_of(pool: RerankerPool) -> Any:
    assert pool._dispatcher is not None
    return pool._dispatcher._deployment


def test_a_reload_makes_a_new_template_and_ends_the_old(forking: MakePool) -> None:
    pool = forking()
    old = template(pool)
    pool.reload(ModelSpec("other", loader="fakes:load_salted"))
    assert template(pool) != old
    psutil.wait_procs([old], timeout=PATIENCE)
    assert not old.is_running()


def test_so_it_does_where_all_workers_rest(forking: MakePool) -> None:
    pool = forking(workers=1, min_workers=0, idle_timeout=0.05)
    until(lambda: pool.workers()[0].state == "resting")
    [old] = pids(pool)
    pool.reload(ModelSpec("other", loader="fakes:load_salted"))
    until(lambda: not psutil.pid_exists(old))


def test_what_a_template_could_not_load_is_said_and_tried_anew(forking: MakePool, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="ValueError: no such luck"):
        forking(ModelSpec("!raise no such luck", loader="fakes:load_obeying"))
    spec = ModelSpec(f"!once {tmp_path / 'tried'} !raise no such luck", loader="fakes:load_obeying")
    pool = forking()
    with pytest.raises(ModelLoadError, match="ValueError: no such luck"):
        pool.reload(spec)
    pool.reload(spec)
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_a_template_that_dies_while_loading_counts_as_a_worker_that_does(forking: MakePool, tmp_path: Path) -> None:
    order = f"!once {tmp_path / 'died'} !signal SIGKILL"
    pool = forking(ModelSpec(order, loader="fakes:load_obeying"), workers=1)
    assert pool.stats().crashes == 1
    with pytest.raises(WorkerCrashedError, match=r"2 workers in a row .* the last died with SIGKILL"):
        forking(ModelSpec("!signal SIGKILL", loader="fakes:load_obeying"), workers=1, max_restarts=1)


def test_a_template_that_hangs_while_loading_is_ended(forking: MakePool, fifo: Fifo) -> None:
    with pytest.raises(WorkerCrashedError, match="hung and was killed"):
        forking(
            ModelSpec("!hang", loader="fakes:load_obeying"), workers=1, start_timeout=0.5, max_restarts=1
        )  # and the test's own end sees that no process is left


def test_a_template_that_is_stopped_is_told_to_go_on(forking: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mp_rerank._workers.forkserver.GIVE_UP_SECONDS", 0.01)
    pool = forking(workers=1)
    stopped, pid = template(pool), pool.workers()[0].pid
    stopped.suspend()
    assert pid is not None
    psutil.Process(pid).kill()
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert template(pool) == stopped


def test_a_template_that_does_not_go_on_is_ended_when_a_worker_waits_too_long_for_it(
    forking: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil.Process, "resume", lambda _: None)
    pool = forking(workers=1, start_timeout=PATIENCE)  # what the next template may take, too
    stopped, pid = template(pool), pool.workers()[0].pid
    stopped.suspend()
    assert pid is not None
    deployment = deployment_of(pool)
    patient, deployment.config = deployment.config, replace(deployment.config, start_timeout=0.2)
    psutil.Process(pid).kill()
    until(lambda: "hung" in pool.stats().exits)
    deployment.config = patient
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    assert template(pool) != stopped


def test_a_model_that_leaves_a_thread_behind_cannot_be_forked_and_that_is_said(forking: MakePool) -> None:
    with pytest.raises(ModelLoadError, match=r"1 threads behind, .* \(\w+.*\): another start_method is needed"):
        forking("fakes:load_beside_a_thread")


def test_threads_that_fetching_leaves_behind_are_none_once_the_model_is_here(
    forking: MakePool, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    pool = forking(ModelSpec(notes.spec.name, loader="fakes:load_as_from_a_hub"), workers=1)
    assert notes.loads == 2
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_a_worker_computes_with_its_own_number_of_threads(forking: MakePool) -> None:
    pool = forking("fakes:load_threaded", threads_per_worker=3)
    assert pool.submit_pairs([("query", "document")]).result(PATIENCE).tolist() == [3.0]


def test_a_template_made_anew_makes_the_model_fast_as_the_first_one_did(forking: MakePool, tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    pool = forking(ModelSpec(str(notes), loader="fakes:load_optimizable"))
    first = template(pool)
    assert notes.read_text().split() == ["none"]
    first.kill()
    until(lambda: notes.read_text().split() == ["none", str(first.pid)])
    serving(pool)


def test_a_model_that_scores_otherwise_in_a_fork_is_found_out_by_the_first(forking: MakePool) -> None:
    with pytest.raises(ModelLoadError, match="its template scores the canary"):
        forking("fakes:load_at_home")


def test_a_later_worker_that_scores_otherwise_than_its_template_leaves_before_it_scores_anything(
    forking: MakePool, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    pool = forking(ModelSpec(str(notes), loader="fakes:load_optimizable"), workers=1)
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    first = pool.workers()[0].pid
    notes.with_suffix(".apart").touch()
    assert first is not None
    psutil.Process(first).kill()
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)
    last = pool.workers()[0].last_exit
    assert last is not None
    assert (pool.workers()[0].generation, last.exit_code) == (3, child.EXIT_UNPROVED)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2 if hasattr(os, "sched_getaffinity") else True, reason="one CPU")
def test_each_numa_node_has_a_template_of_its_own(forking: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the model's pages are in the memory next to the cores."""
    one, other = sorted(os.sched_getaffinity(0))[:2]
    seats = [Seat("cpu", 1, (cpu,)) for cpu in (one, other, one)]
    monkeypatch.setattr(dispatcher, "make_plan", lambda *_: Plan(tuple(seats), ()))
    pool = forking()
    workers = [psutil.Process(worker.pid) for worker in pool.workers()]
    assert len(templates(pool)) == 2
    assert workers[0].parent() == workers[2].parent()
    for worker, seat in zip(workers, seats, strict=True):
        above = worker.parent()
        assert above is not None
        assert worker.cpu_affinity() == above.cpu_affinity() == list(seat.cpus)


@pytest.mark.real
def test_a_real_model_s_workers_share_it_and_score_as_others_do(make_pool: MakePool) -> None:
    pytest.importorskip("torch")
    documents = [" ".join(["Berlin", *DOCUMENTS[: i % 7]]) for i in range(40)]
    with make_pool("builtin", workers=1) as others:
        expected = others.submit_pairs([("query", document) for document in documents]).result(PATIENCE)
    with make_pool("builtin", start_method="fork-model", threads_per_worker=2) as pool:
        scores = pool.submit_pairs([("query", document) for document in documents]).result(PATIENCE)
        assert abs(scores - expected).max() < 1e-6
        assert template(pool).num_threads() == 1
        for worker in pool.memory().workers:
            assert worker.uss is not None
            assert worker.uss < worker.rss / 4
