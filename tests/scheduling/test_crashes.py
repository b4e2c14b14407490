"""Workers that die, whenever and of whatever: nothing is lost, doubled or swapped, and the right one is blamed.

Every death is a real process's.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, Fifo, kill, ranked, stays, until
from fakes import Obeying, scores_of

from mp_rerank import ModelSpec, PoolClosedError, RerankerPool, ScoringError, WorkerCrashedError
from mp_rerank._workers.logs import WORKER_LOGGER

MakePool = Callable[..., RerankerPool]

DEATHS = {"!signal SIGKILL": -9, "!segfault": -11, "!os._exit 5": 5, "!signal SIGABRT": -6, "!signal SIGTERM": -15}


def documents(count: int, name: str = "document") -> list[str]:
    return [f"{name} {i}" for i in range(count)]


def ready_again(pool: RerankerPool, slot: int, generation: int) -> Callable[[], bool]:
    def ready() -> bool:
        info = pool.workers()[slot]
        return info.generation == generation and info.state == "ready"

    return ready


@pytest.mark.parametrize("order", DEATHS)
def test_a_death_while_scoring_costs_nobody_a_score(make_pool: MakePool, tmp_path: Path, order: str) -> None:
    with make_pool() as pool:
        mortal = [*documents(5), f"!once {tmp_path / 'died'} {order}", *documents(200)]
        futures = [pool.submit(f"query {i}", documents(30)) for i in range(20)]
        dying = pool.submit("query", mortal)
        futures += [pool.submit(f"query {i}", documents(30)) for i in range(20, 40)]
        assert dying.result(PATIENCE) == ranked("query", mortal)
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", documents(30)) for i in range(40)]
        until(lambda: {w.state for w in pool.workers()} == {"ready"})
        stats = pool.stats()
    assert (stats.crashes, stats.restarts, stats.failed) == (1, 1, 0)
    assert stats.pending_pairs == 0


def test_only_the_dead_worker_s_slices_run_again(make_pool: MakePool, fifo: Fifo, tmp_path: Path) -> None:
    """The running slice and the one behind it: the other worker's go on untouched."""
    with make_pool(slice_tokens=60) as pool:
        notes = [f"!note {tmp_path / str(i)}" for i in range(30)]
        stuck = pool.submit("query", [f"!once {tmp_path / 'stuck'} {fifo.order}"])
        fifo.wait_until_read()
        # The other worker scores all of these but for those that wait behind the gate.
        others = [pool.submit("query", [note]) for note in notes]
        until(lambda: sum(f.done() for f in others) >= 10)
        psutil.Process(fifo.pid).kill()
        assert stuck.result(PATIENCE)[0].relevance_score is not None
        assert [f.result(PATIENCE) for f in others] == [ranked("query", [note]) for note in notes]
        fifo.release()
    assert [(tmp_path / str(i)).read_text() for i in range(30)] == ["."] * 30


@pytest.mark.parametrize("order", DEATHS)
def test_a_death_while_idle_is_noticed_without_a_next_job(make_pool: MakePool, order: str) -> None:
    with make_pool() as pool:
        first = pool.workers()[0].pid
        assert first is not None
        name = order.split()[-1] if order.startswith("!signal") else "SIGKILL"
        os.kill(first, getattr(signal, name))
        until(ready_again(pool, 0, 2))
        assert pool.workers()[0].pid != first
        assert pool.stats().crashes == 1
        assert pool.rerank("query", documents(50)) == ranked("query", documents(50))


def test_all_workers_dead_at_once(make_pool: MakePool) -> None:
    with make_pool(workers=3) as pool:
        futures = [pool.submit(f"query {i}", documents(100)) for i in range(10)]
        for info in pool.workers():
            assert info.pid is not None
            psutil.Process(info.pid).kill()
        futures += [pool.submit(f"query {i}", documents(100)) for i in range(10, 20)]
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", documents(100)) for i in range(20)]


def test_deaths_at_random_moments_between_and_during_jobs(make_pool: MakePool) -> None:
    with make_pool(max_restarts=1000, max_attempts=1000) as pool:
        stop = threading.Event()

        def reap() -> None:
            while not stop.wait(0.05):
                for info in pool.workers()[:1]:
                    if info.pid is not None:
                        try:
                            psutil.Process(info.pid).kill()
                        except psutil.NoSuchProcess:
                            pass

        reaper = threading.Thread(target=reap)
        reaper.start()
        try:
            for i in range(150):
                assert pool.rerank(f"query {i}", documents(i)) == ranked(f"query {i}", documents(i))
        finally:
            stop.set()
            reaper.join()
        assert pool.stats().crashes > 0


@pytest.mark.parametrize("moment", ["interpreter", "import", "initializer", "unpickling"])
def test_a_death_on_the_way_to_being_ready(
    make_pool: MakePool, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = f"!once {tmp_path / 'died'} !signal SIGKILL"
    spec = ModelSpec("fake", loader="fakes:load")
    if moment == "import":
        monkeypatch.setenv("DIES_AT_IMPORT", order)
        spec = ModelSpec("fake", loader="dies_at_import:load")
    elif moment == "initializer":
        spec = ModelSpec(order, loader="fakes:load_obeying")
    elif moment == "unpickling":
        spec = ModelSpec("fake", loader="fakes:load", model_kwargs={"obey": Obeying(order)})
    pool = make_pool(spec)
    if moment == "interpreter":
        starting = threading.Thread(target=pool.start)
        starting.start()
        until(lambda: bool(pool.workers()) and pool.workers()[0].pid is not None)
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        starting.join()
    pool.start()
    by_template = pool.config.start_method == "fork-model" and moment != "interpreter"  # both workers wait for it
    assert pool.stats().crashes == (2 if by_template else 1)
    assert pool.rerank("query", documents(9)) == ranked("query", documents(9))


def test_out_of_memory_as_an_exception_is_the_document_s_own(make_pool: MakePool) -> None:
    with make_pool() as pool:
        large = pool.submit("query", ["small", "!eat"])
        small = [pool.submit("query", [f"document {i}"]) for i in range(9)]
        with pytest.raises(ScoringError, match="MemoryError") as caught:
            large.result(PATIENCE)
        assert caught.value.document_index == 1
        assert [f.result(PATIENCE) for f in small] == [ranked("query", [f"document {i}"]) for i in range(9)]
        assert pool.stats().crashes == 0


def test_a_worker_that_has_lost_its_gpu_leaves_and_its_slice_is_scored_by_another(
    make_pool: MakePool, tmp_path: Path
) -> None:
    """The error stays with the process: whatever it scored next would fail too, whoever's it is."""
    with make_pool() as pool:
        order = f"!once {tmp_path / 'lost'} !lose-device"
        texts = [*documents(9), order]
        assert pool.rerank("query", texts) == ranked("query", texts)
        assert pool.stats().crashes == 1
        with pytest.raises(WorkerCrashedError, match="exit code 75") as caught:
            pool.rerank("query", ["!lose-device"])
        assert caught.value.document_index == 0


@pytest.mark.parametrize("order", DEATHS)
def test_a_poison_document_fails_alone(make_pool: MakePool, fifo: Fifo, order: str) -> None:
    with make_pool(workers=1) as pool:
        gate = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        behind = pool.submit("query", ["waits behind the gate"])
        before = [pool.submit(f"query {i}", documents(3)) for i in range(5)]  # these share a slice with it
        poisoned = pool.submit("query", [*documents(4), order, *documents(4)])
        after = [pool.submit(f"query {i}", documents(3)) for i in range(5)]
        fifo.release()
        with pytest.raises(WorkerCrashedError) as caught:
            poisoned.result(PATIENCE)
        for futures in (before, after):
            assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", documents(3)) for i in range(5)]
        assert gate.result(PATIENCE)
        assert behind.result(PATIENCE)
        assert pool.stats().crashes == 3
        assert pool.stats().failed == 1
    error = caught.value
    assert (error.document_index, error.attempts, error.device, error.exit_code) == (4, 3, "cpu", DEATHS[order])
    assert "document 4 ended 3 workers" in str(error)


@pytest.mark.parametrize("max_attempts", [1, 2, 5])
def test_as_many_workers_may_die_on_a_document_as_is_allowed(make_pool: MakePool, max_attempts: int) -> None:
    with make_pool(max_attempts=max_attempts, max_restarts=20) as pool:
        with pytest.raises(WorkerCrashedError) as caught:
            pool.rerank("query", ["!os._exit 3"])
        assert caught.value.attempts == max_attempts
        assert pool.stats().crashes == max_attempts


def test_poison_in_every_request_leaves_the_pool_standing(make_pool: MakePool) -> None:
    """As long as anything is scored between: deaths that are explained say nothing against the seats."""
    with make_pool(max_restarts=3) as pool:
        for i in range(5):
            bad = pool.submit("query", ["!os._exit 3"])
            with pytest.raises(WorkerCrashedError, match="document 0"):
                bad.result(PATIENCE)
            assert pool.rerank(f"query {i}", documents(3)) == ranked(f"query {i}", documents(3))
        assert {w.state for w in pool.workers()} <= {"ready", "restarting"}


def test_the_same_poison_asked_for_again_and_again_takes_no_seat_away(make_pool: MakePool) -> None:
    """An agent that tries again is one document's fault, with nothing else scored between."""
    with make_pool(workers=1, max_attempts=2, max_restarts=2) as pool:
        assert pool.rerank("query", documents(1))
        for _ in range(6):
            error = pool.submit("query", ["!os._exit 3"]).exception(PATIENCE)
            assert "document 0 ended 2 workers" in str(error)
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))


def test_one_poison_after_the_other_and_nothing_between_ends_the_pool(make_pool: MakePool) -> None:
    with make_pool(workers=1, max_attempts=2, max_restarts=3) as pool:
        assert pool.rerank("query", documents(1))
        errors = [pool.submit("query", [f"!os._exit {i}"]).exception(PATIENCE) for i in range(1, 8)]
        assert all(isinstance(error, WorkerCrashedError) for error in errors)
        assert ["document 0 ended 2 workers" in str(error) for error in errors] == [True] * 4 + [False] * 3
        assert {w.state for w in pool.workers()} == {"failed"}


def test_a_model_that_dies_of_every_document_ends_the_pool(make_pool: MakePool) -> None:
    with make_pool(ModelSpec("deadly", loader="fakes:load_deadly"), max_restarts=4) as pool:
        futures = [pool.submit(f"query {i}", documents(20)) for i in range(50)]
        errors = [f.exception(PATIENCE) for f in futures]
        assert all(isinstance(error, WorkerCrashedError) for error in errors)
        assert len({id(error) for error in errors}) == 50  # raised in 50 threads, they would share a traceback
        until(lambda: {w.state for w in pool.workers()} == {"failed"})
        for _ in range(3):
            with pytest.raises(WorkerCrashedError, match="workers in a row ended on cpu"):
                pool.submit("query", ["document"]).result(PATIENCE)
        stats = pool.stats()
    assert stats.crashes <= 2 * 5
    assert stats.pending_requests == stats.pending_pairs == 0


def test_so_does_one_that_began_after_it_had_scored(make_pool: MakePool) -> None:
    with make_pool(max_restarts=4) as pool:
        assert pool.rerank("query", documents(9))
        pool.reload(ModelSpec("deadly", loader="fakes:load_deadly"))
        for _ in range(20):
            error = pool.submit("query", documents(3)).exception(PATIENCE)
            assert isinstance(error, WorkerCrashedError)
        assert {w.state for w in pool.workers()} == {"failed"}
        # Not for good: another model gets workers of its own.
        pool.reload(ModelSpec("fake", loader="fakes:load"))
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))


def test_a_crash_loop_while_loading_ends_the_start(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("!os._exit 4", loader="fakes:load_obeying"), max_restarts=3)
    with pytest.raises(WorkerCrashedError, match=r"4 workers in a row ended on cpu.* exit code 4") as caught:
        pool.start()
    assert (caught.value.exit_code, caught.value.attempts) == (4, 4)
    for _ in range(2):
        with pytest.raises(WorkerCrashedError):
            pool.submit("query", ["document"])
    assert all(stays(child) for child in psutil.Process().children())


def test_the_pool_goes_on_with_the_seats_that_are_left(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker dies, and its successors all die while they load."""
    monkeypatch.setenv("DIES_AT_IMPORT", "")
    with make_pool(ModelSpec("fake", loader="dies_at_import:load"), max_restarts=2) as pool:
        monkeypatch.setenv("DIES_AT_IMPORT", "!signal SIGKILL")
        kill(pool, 1)
        until(lambda: pool.workers()[1].state == "failed")
        assert [w.state for w in pool.workers()] == ["ready", "failed"]
        assert pool.rerank("query", documents(500)) == ranked("query", documents(500))
        assert pool.stats().crashes == 3


def test_back_off_grows_and_is_kept(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIES_AT_IMPORT", "")
    with make_pool(
        ModelSpec("fake", loader="dies_at_import:load"), workers=1, max_restarts=5, restart_backoff=1000.0
    ) as pool:
        monkeypatch.setenv("DIES_AT_IMPORT", "!signal SIGKILL")
        kill(pool, 0)
        until(lambda: pool.stats().crashes == 2)  # the first restart is at once
        assert pool.workers()[0].state == "restarting"
        waiting = pool.submit("query", ["document"], timeout=0.05)
        assert "0 of 1" in str(waiting.exception(PATIENCE))
        assert pool.stats().restarts == 1


@pytest.mark.parametrize("size", [100_000, 8_000_000])
@pytest.mark.parametrize("stopped", [False, True], ids=["scoring", "not reading"])
def test_a_death_with_a_large_document_in_flight(
    make_pool: MakePool, fifo: Fifo, tmp_path: Path, size: int, stopped: bool
) -> None:
    """A thread of the executor is in the middle of writing it into the dead worker's pipe."""
    with make_pool(workers=1) as pool:
        stuck = pool.submit("query", [f"!once {tmp_path / 'stuck'} {fifo.order}"])
        fifo.wait_until_read()
        if stopped:
            psutil.Process(fifo.pid).suspend()
        large = ["x" * size, "y" * size]
        futures = [pool.submit("query", [document]) for document in large]
        psutil.Process(fifo.pid).kill()
        assert [f.result(PATIENCE) for f in futures] == [ranked("query", [document]) for document in large]
        assert stuck.result(PATIENCE)
        fifo.release()


def test_a_death_in_the_middle_of_writing_a_result(make_pool: MakePool, tmp_path: Path) -> None:
    """The rest of it never comes: that must not be waited for."""
    with make_pool(ModelSpec(str(tmp_path / "died"), loader="fakes:load_dying_in_answer"), workers=1) as pool:
        assert pool.rerank("query", documents(100)) == ranked("query", documents(100))
        assert pool.stats().crashes == 1


def test_a_worker_whose_pipes_close_is_ended_and_replaced(make_pool: MakePool, tmp_path: Path) -> None:
    """Some libraries close every file they did not open. Its executor gives it up; it must not live on."""
    with make_pool(workers=1) as pool:
        pid = pool.workers()[0].pid
        assert pid is not None
        process = psutil.Process(pid)
        document = f"!once {tmp_path / 'closed'} !close-files"
        assert pool.rerank("query", [document]) == ranked("query", [document])
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_hundreds_of_crashes_leave_nothing_behind(make_pool: MakePool) -> None:
    def footprint() -> tuple[int, int, int]:
        gc.collect()
        return process.num_fds(), threading.active_count(), len(process.children(recursive=True))

    process = psutil.Process()
    cycles = 200
    with make_pool(workers=4, max_restarts=10 * cycles, restart_backoff=0.0) as pool:
        before = footprint()
        while pool.stats().crashes < cycles:
            until(lambda: any(info.pid is not None for info in pool.workers()))
            for info in pool.workers():  # loading, idle, just launched: whatever they are at
                if info.pid is not None:
                    try:
                        psutil.Process(info.pid).kill()
                    except psutil.NoSuchProcess:
                        pass
        until(lambda: {w.state for w in pool.workers()} == {"ready"})
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))
        until(lambda: footprint() == before)


def test_a_worker_that_cannot_be_launched_is_tried_again(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    import mp_rerank._workers.slot

    real = mp_rerank._workers.handle.ProcessHandle
    refusals = iter([RuntimeError("can't start new thread")] * 2)

    def launch(*args: object, **options: object) -> object:
        error = next(refusals, None)
        if error is not None:
            raise error
        return real(*args, **options)  # type: ignore[arg-type]

    with make_pool(workers=1) as pool:
        monkeypatch.setattr(mp_rerank._workers.handle, "ProcessHandle", launch)
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))


def test_a_thread_that_cannot_be_started_leaves_no_process(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.endswith("-logs"):
            raise RuntimeError("can't start new thread")
        start(thread)

    pool = make_pool(workers=1, max_restarts=1)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(WorkerCrashedError, match="could not be launched: RuntimeError: can't start new thread"):
            pool.start()


def test_a_log_handler_that_raises_or_blocks_hides_no_death(make_pool: MakePool) -> None:
    release = threading.Event()

    class Blocking(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.wait(PATIENCE)

    def raise_error(record: logging.LogRecord) -> bool:
        raise ValueError("a filter of the caller's")

    logger = logging.getLogger(WORKER_LOGGER)
    handler = Blocking()
    with make_pool() as pool:
        logger.addFilter(raise_error)
        try:
            for word in ("one", "two"):
                assert pool.rerank("query", [f"!say {word}"]) == ranked("query", [f"!say {word}"])
        finally:
            logger.removeFilter(raise_error)
        logger.addHandler(handler)
        try:
            pool.submit_pairs([("query", "!say three")] * 2).result(PATIENCE)
            for info in pool.workers():
                assert info.pid is not None
                psutil.Process(info.pid).kill()
            until(ready_again(pool, 0, 2))
            until(ready_again(pool, 1, 2))
        finally:
            release.set()
            logger.removeHandler(handler)


def test_a_log_handler_that_raises_ends_no_pool(make_pool: MakePool, tmp_path: Path) -> None:
    """What the pool itself has to say of a death is said on the thread that all depend on."""
    said_by = []

    class Broken(logging.Handler):
        def handle(self, record: logging.LogRecord) -> bool:
            said_by.append(record.module)
            raise OSError("the log server is gone")

    broken = Broken()
    logging.getLogger("mp_rerank").addHandler(broken)
    try:
        with make_pool() as pool:
            mortal = ["fine", f"!once {tmp_path / 'died'} !os._exit 3"]
            assert pool.rerank("query", mortal) == ranked("query", mortal)
            assert pool.stats().crashes == 1
    finally:
        logging.getLogger("mp_rerank").removeHandler(broken)
    assert set(said_by) == {"deployment"}, "and not what guards it"


def test_futures_tampered_with_by_their_owner_hurt_only_him(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        future = pool.submit("query", documents(500))
        future.set_result([])
        other = pool.submit("query", documents(500))
        other.set_running_or_notify_cancel()
        assert pool.rerank("query", documents(5)) == ranked("query", documents(5))


def test_an_error_of_a_finished_pool_is_new_each_time(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("!raise cannot load", loader="fakes:load_obeying"))
    errors = []
    for _ in range(2):
        with pytest.raises(Exception, match="cannot load") as caught:
            pool.start()
        errors.append(caught.value)
    assert errors[0] is not errors[1]
    pool.close()
    with pytest.raises(PoolClosedError):
        pool.start()


def test_scores_stay_with_their_pairs_while_workers_die(make_pool: MakePool, tmp_path: Path) -> None:
    """Ten times in a large request, and in one slice: it puts the longest together."""
    pairs = [(f"query {i % 11}", f"document {i}") for i in range(3000)]
    for i in range(0, 3000, 300):
        pairs[i] = ("query", f"!once {tmp_path / str(i)} !os._exit 1")
    with make_pool(max_restarts=100, max_attempts=20) as pool:
        scores = pool.submit_pairs(pairs).result(PATIENCE)
    assert scores.tolist() == [scores_of(query, [document])[0] for query, document in pairs]
