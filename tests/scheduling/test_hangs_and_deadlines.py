"""Workers that never come back, requests that cannot wait, and requests nobody waits for any more."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from pathlib import Path

import psutil
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked, until
from fakes import score_of

from mp_rerank import ModelSpec, RequestTimeoutError, RerankerPool, RerankResult, WorkerCrashedError
from mp_rerank._planning.plan import Seat
from mp_rerank._scheduling.departures import GRACE_SECONDS
from mp_rerank._scheduling.deployment import HANG_MARGIN, KILL_GRACE_SECONDS, LOST_AFTER_SECONDS, Deployment
from mp_rerank._scheduling.queue import Slice
from mp_rerank._scheduling.request import Request
from mp_rerank._workers.child import Scored
from mp_rerank._workers.slot import Exited, SliceEnded, Slot, SlotState
from mp_rerank.config import PoolConfig
from mp_rerank.results import PoolStats

MakePool = Callable[..., RerankerPool]

LONG = 1e9  # seconds


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


# Hanging.


def test_a_worker_that_hangs_is_killed_and_its_slice_scored_elsewhere(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool(hang_timeout=0.3) as pool:
        before = {w.pid for w in pool.workers()}
        mixed = [*documents(3), f"!once {tmp_path / 'hung'} !hang", *documents(3)]
        futures = [pool.submit(f"query {i}", documents(5)) for i in range(10)]
        assert pool.submit("query", mixed).result(PATIENCE) == ranked("query", mixed)
        assert [f.result(PATIENCE) for f in futures] == [ranked(f"query {i}", documents(5)) for i in range(10)]
        until(lambda: {w.state for w in pool.workers()} == {"ready"})
        assert pool.stats().crashes == 1
        assert len(before & {w.pid for w in pool.workers()}) == 1


def test_a_document_that_hangs_every_worker_fails_alone(make_pool: MakePool) -> None:
    with make_pool(hang_timeout=0.2) as pool:
        with pytest.raises(WorkerCrashedError, match="hung and was killed") as caught:
            pool.rerank("query", ["fine", "!hang"])
        assert (caught.value.document_index, caught.value.attempts, caught.value.exit_code) == (1, 3, -signal.SIGKILL)


def test_a_worker_that_was_stopped_counts_as_hung(make_pool: MakePool) -> None:
    with make_pool(workers=1, hang_timeout=0.3) as pool:
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).suspend()
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))
        assert pool.stats().crashes == 1


def test_a_model_that_never_finishes_loading_is_given_up(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("!hang", loader="fakes:load_obeying"), start_timeout=0.5, max_restarts=1)
    with pytest.raises(WorkerCrashedError, match=r"2 workers in a row ended on cpu.* hung and was killed"):
        pool.start()


def test_slow_is_not_hung(make_pool: MakePool) -> None:
    """A slice that takes many times ``hang_timeout``, as its size and the measured speed let expect."""
    slow = ModelSpec("0.002", loader="fakes:load_paced")  # 500 tokens a second, and the canary says so
    with make_pool(slow, workers=1, hang_timeout=0.05, slice_tokens=700) as pool:
        assert pool.rerank("query", ["word " * 100] * 20)
        assert pool.stats().crashes == 0
        assert pool.workers()[0].tokens_per_second < 1000


def test_it_is_that_very_process_that_is_killed(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pid is used again when its process is gone; the creation time tells them apart."""
    with make_pool(workers=1) as pool:
        dispatcher = pool._dispatcher
        assert dispatcher is not None
        worker = dispatcher._deployment.slots[0].worker  # type: ignore[union-attr]
        assert worker is not None
        assert worker.pid is not None
        stranger = psutil.Process(worker.pid)
        monkeypatch.setattr(worker._psutil, "_create_time", 1.0)  # type: ignore[attr-defined]
        monkeypatch.setattr(worker._psutil, "_ident", (worker.pid, 1.0))  # type: ignore[attr-defined]
        worker.kill()
        assert stranger.is_running()
        monkeypatch.undo()
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))


# The deployment by itself: time is an argument, and its workers are only told of.


class StandIn:
    """A worker that records what it is told."""

    def __init__(self) -> None:
        self.alive = True
        self.killed = False
        self.killable = True
        self.abandoned = False
        self.left = False
        self.pid = 1
        self.scoring = 0  # slices it was given

    def kill(self) -> None:
        self.killed = True

    def score(self, pairs: object, options: object) -> Future[object]:
        self.scoring += 1
        return Future()

    def retire(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass

    def abandon(self) -> None:
        self.abandoned = True


def busy_deployment(tokens: int, seconds_per_token: float, **options: object) -> tuple[Deployment, StandIn, Slice]:
    """A deployment of one worker that has just been given a slice, at 0 seconds."""
    deployment = Deployment(
        FAKE, [Seat("cpu", 1)], PoolConfig.of(options), lambda _: None, lambda *_: None, PoolStats()
    )
    [slot] = deployment.slots
    standing = StandIn()
    slot.worker = standing  # type: ignore[assignment]
    slot.generation = 1
    slot.state = SlotState.READY
    slot.seconds_per_token = seconds_per_token
    deployment.submit(Request([("query", "document")], [tokens], lambda scores, *_: scores))
    slice_ = deployment.queue.take(tokens)
    assert slice_ is not None
    slot.outstanding.append(slice_)
    return deployment, standing, slice_


@pytest.mark.parametrize(("tokens", "seconds_per_token"), [(100, 0.001), (100_000, 0.001), (100_000, 0.1)])
def test_the_limit_follows_the_size_and_the_speed(tokens: int, seconds_per_token: float) -> None:
    deployment, standing, _ = busy_deployment(tokens, seconds_per_token, hang_timeout=60.0)
    limit = 60.0 + HANG_MARGIN * tokens * seconds_per_token
    assert deployment.wake_at() == pytest.approx(limit)
    deployment.tick(limit * 0.999)
    assert not standing.killed
    deployment.tick(limit * 1.001)
    assert standing.killed
    assert deployment.wake_at() == pytest.approx(limit * 1.001 + KILL_GRACE_SECONDS)


@pytest.mark.parametrize(("tokens", "at"), [(1000, 0.75), (5, 0.0)])
def test_the_next_slice_is_sent_when_three_quarters_of_the_running_one_should_be_done(tokens: int, at: float) -> None:
    """What arrives until then can still go first. At once where the running one takes no time to speak of."""
    deployment, standing, _ = busy_deployment(tokens, 0.001, hang_timeout=None)
    deployment.submit(Request([("query", "next")], [tokens], lambda scores, *_: scores))
    if at:
        deployment.dispatch(0.0)
        assert deployment.wake_at() == at
        deployment.dispatch(at * 0.99)
        assert standing.scoring == 0
    deployment.dispatch(at)
    assert standing.scoring == 1
    assert deployment.wake_at() is None
    deployment.submit(Request([("query", "a third")], [tokens], lambda scores, *_: scores))
    deployment.dispatch(100.0)
    assert standing.scoring == 1, "one runs and one waits"
    assert deployment.wake_at() is None, "a slice that comes back wakes it"


def test_a_worker_that_cannot_be_killed_is_given_up_and_its_slices_go_elsewhere_without_blame() -> None:
    """In an uninterruptible system call, in a frozen control group, or no longer ours to kill."""
    deployment, standing, slice_ = busy_deployment(10, 0.001, hang_timeout=60.0)
    [slot] = deployment.slots
    [request] = deployment.queue.live.values()
    other = Slot(1, Seat("cpu", 1), lambda _: None)
    other.state = SlotState.READY
    deployment.slots.append(other)
    deployment._started = True
    deployment.tick(100.0)
    assert standing.killed
    assert slot.state is SlotState.RESTARTING, "it is given nothing more"
    deployment.tick(100.0 + KILL_GRACE_SECONDS - 0.1)
    assert deployment.queue.waiting_tokens == 0
    deployment.tick(100.0 + KILL_GRACE_SECONDS)
    assert slot.state is SlotState.FAILED
    assert standing.abandoned
    assert deployment.queue.waiting_tokens == 10
    assert [pair.attempts for pair in slice_.pending] == [0]
    assert not request.done
    assert deployment.failure is None
    assert slot.info().last_exit is not None
    assert slot.info().last_exit.reason == "unkillable"  # type: ignore[union-attr]
    deployment.handle(SliceEnded(slot, 1, slice_, BrokenExecutor()), 200.0)  # its last words change nothing
    deployment.handle(Exited(slot, 1, -9), 200.0)
    assert slot.state is SlotState.FAILED


def test_closing_does_not_wait_for_a_worker_that_cannot_be_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the interpreter's exit, for what is abandoned."""
    monkeypatch.setattr("mp_rerank._scheduling.departures.GRACE_SECONDS", 0.0)
    deployment, standing, _ = busy_deployment(10, 0.001)
    deployment.close(0.0, kill=True)
    deployment.join()
    assert standing.killed
    assert standing.abandoned


def test_one_slice_measured_too_fast_makes_the_next_not_hung() -> None:
    deployment, _, slice_ = busy_deployment(1000, 0.1, hang_timeout=60.0)
    [slot] = deployment.slots
    slot.took(slice_, 1e-9, 0.0)
    assert slot.seconds_per_token == pytest.approx(0.08)


def test_without_a_hang_timeout_nobody_is_killed() -> None:
    deployment, standing, _ = busy_deployment(10, 0.001, hang_timeout=None)
    assert deployment.wake_at() is None
    deployment.tick(LONG)
    assert not standing.killed


def test_slices_of_a_dead_worker_that_never_come_back_are_given_up() -> None:
    """A fork of the parent may hold a worker's pipes open; the executor then waits for what no one will write."""
    deployment, _, slice_ = busy_deployment(10, 0.001, hang_timeout=None)
    [slot] = deployment.slots
    deployment.handle(Exited(slot, 1, -9), 100.0)
    assert deployment.wake_at() == 100.0 + LOST_AFTER_SECONDS
    assert slot.state is SlotState.RESTARTING
    deployment.tick(100.0 + LOST_AFTER_SECONDS)
    assert deployment.queue.waiting_tokens == 10
    assert slot.restart_at == 100.0 + LOST_AFTER_SECONDS
    too_late = SliceEnded(slot, 1, slice_, Scored(b"\0\0\0\0", None, 1.0))
    deployment.handle(too_late, 200.0)  # it will be scored again
    assert deployment.queue.waiting_tokens == 10


def test_a_slice_scored_before_the_death_was_known_still_counts() -> None:
    """The exit may be reported before the last result; the slot must not wait for another."""
    deployment, _, slice_ = busy_deployment(10, 0.001)
    [slot] = deployment.slots
    [request] = deployment.queue.live.values()
    deployment.handle(Exited(slot, 1, -9), 1.0)
    deployment.handle(SliceEnded(slot, 1, slice_, Scored(b"\0\0\0\0", None, 1.0)), 1.0)
    assert request.future.result(0).tolist() == [0.0]
    assert slot.restart_at == 1.0


def test_a_worker_that_does_not_leave_is_killed_after_its_grace() -> None:
    deployment, standing, _ = busy_deployment(10, 0.001)
    deployment.close(7.0, kill=False)
    assert deployment.wake_at() == 7.0 + GRACE_SECONDS
    deployment.tick(7.0 + GRACE_SECONDS - 0.1)
    assert not standing.killed
    deployment.tick(7.0 + GRACE_SECONDS)
    assert standing.killed
    standing.alive = False
    assert not deployment.alive


def test_a_worker_let_go_in_the_middle_of_a_slice_is_not_hung_as_well() -> None:
    """As by a reload, when nobody waits for the slice any more: the limit of its slice comes before its grace ends."""
    deployment, standing, _ = busy_deployment(10, 0.001, hang_timeout=1.0)
    deployment.close(0.0, kill=False)
    assert deployment.wake_at() == LOST_AFTER_SECONDS
    deployment.tick(LOST_AFTER_SECONDS - 0.1)
    assert not standing.killed


def test_a_worker_that_loads_has_nothing_to_finish() -> None:
    deployment, standing, _ = busy_deployment(10, 0.001)
    deployment.slots[0].state = SlotState.STARTING
    deployment.close(7.0, kill=False)
    assert standing.killed


# Deadlines.


def test_what_is_unscored_at_the_deadline_is_dropped(make_pool: MakePool, fifo: Fifo, tmp_path: Path) -> None:
    with make_pool(workers=1, slice_tokens=20) as pool:
        gate = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        expiring = pool.submit("query", [f"!note {tmp_path / str(i)}" for i in range(50)], timeout=0.1)
        with pytest.raises(RequestTimeoutError, match=r"0 of 50 documents were scored within 0\.1 s") as caught:
            expiring.result(PATIENCE)
        assert isinstance(caught.value, TimeoutError)
        assert (caught.value.timeout, caught.value.scored, caught.value.total) == (0.1, 0, 50)
        assert pool.stats().timed_out == 1
        assert pool.stats().pending_pairs == 1
        fifo.release()
        assert gate.result(PATIENCE)
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))
    assert len(list(tmp_path.glob("[0-9]*"))) <= 1  # at most what was already in the worker's hands


def test_a_partial_ranking_has_what_was_scored_and_then_the_rest(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=10) as pool:
        # The longest goes first, and the gate is the shortest: all the others are scored by then.
        kept = [f"document {i} of a certain length, longer than the path of the gate {'x' * 200}" for i in range(4)]
        future = pool.submit("query", [kept[0], fifo.order, *kept[1:]], timeout=3.0, on_timeout="partial")
        fifo.wait_until_read()
        results = future.result(PATIENCE)
        scored = sorted(((score_of("query", d), i) for d, i in zip(kept, (0, 2, 3, 4), strict=True)), reverse=True)
        assert [(r.relevance_score, r.index) for r in results[:4]] == scored
        assert results[4] == RerankResult(1, None, fifo.order)
        pairs = pool.submit_pairs([("query", kept[0])], timeout=0.05, on_timeout="partial").result(PATIENCE)
        assert str(pairs.tolist()) == "[nan]"
        assert pool.stats().timed_out == 2
        fifo.release()


def test_a_deadline_passes_on_time_in_a_pool_that_is_stuck_or_broken(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, restart_backoff=1000.0) as pool:
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).suspend()
        with pytest.raises(RequestTimeoutError):
            pool.rerank("query", documents(3), timeout=0.05)
        psutil.Process(pid).kill()
        with pytest.raises(RequestTimeoutError):
            pool.rerank("query", documents(3), timeout=1e-9)


@pytest.mark.parametrize("timeout", [1e12, float("inf")])
def test_any_number_of_seconds_will_do(make_pool: MakePool, timeout: float) -> None:
    with make_pool(workers=1, hang_timeout=timeout, start_timeout=timeout) as pool:
        assert pool.rerank("query", documents(3), timeout=timeout) == ranked("query", documents(3))
        pool.close(timeout=None)


def test_deadlines_come_in_their_own_order(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        start = time.monotonic()
        timeouts = [0.4, 0.1, 0.3, 0.2, LONG]
        futures = [pool.submit("query", documents(3), timeout=timeout) for timeout in timeouts]
        expired: list[float] = []
        for timeout, future in zip(timeouts, futures, strict=True):
            future.add_done_callback(lambda _, timeout=timeout: expired.append(timeout))  # type: ignore[misc]
        until(lambda: len(expired) == 4)
        assert time.monotonic() - start >= 0.4
        assert not futures[-1].done()
        fifo.release()


# Cancelling.


def test_cancelling_drops_what_waits_and_kills_nothing(make_pool: MakePool, fifo: Fifo, tmp_path: Path) -> None:
    with make_pool(workers=1, slice_tokens=20) as pool:
        pid = pool.workers()[0].pid
        note = tmp_path / "note"
        future = pool.submit("query", [fifo.order, *(f"!note {note}" for _ in range(100))])
        fifo.wait_until_read()
        scored = len(note.read_text()) if note.exists() else 0
        assert future.cancel()
        until(lambda: pool.stats().cancelled == 1)
        assert pool.stats().pending_pairs == 0
        fifo.release()
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))
        assert pool.workers()[0].pid == pid
        assert pool.stats().crashes == 0
        assert (len(note.read_text()) if note.exists() else 0) <= scored + 1
        assert not future.cancel() or future.cancelled()


def test_cancelling_half_of_many(make_pool: MakePool) -> None:
    with make_pool() as pool:
        futures = [pool.submit(f"query {i}", documents(20)) for i in range(100)]
        cancelled = [future.cancel() for future in futures[::2]]
        for i, future in enumerate(futures):
            if i % 2 or not cancelled[i // 2]:
                assert future.result(PATIENCE) == ranked(f"query {i}", documents(20))
            else:
                assert future.cancelled()
        stats = pool.stats()
        assert stats.cancelled + stats.completed == 100
        assert stats.pending_pairs == 0
