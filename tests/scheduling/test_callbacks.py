"""What callers do in done-callbacks is theirs: it delays and breaks nobody else."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psutil
import pytest
from conftest import PATIENCE, Fifo, ranked, until

from mp_rerank import ModelSpec, PoolClosedError, RerankerPool, ScoringError, WorkerCrashedError

MakePool = Callable[..., RerankerPool]


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


@pytest.fixture
def held(make_pool: MakePool, fifo: Fifo) -> tuple[RerankerPool, Future[Any]]:
    """A pool of one worker at the gate, and a future behind it: callbacks added now run when it is resolved."""
    pool = make_pool(workers=1).start()
    pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    return pool, pool.submit("query", documents(3))


def test_a_future_knows_how_long_its_request_waited_and_was_scored(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1).start()
    first: Any = pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    begun = time.monotonic()
    second: Any = pool.submit("query", documents(3))
    equal: Any = pool.submit("query", documents(2))
    until(lambda: pool.stats().pending_requests == 3)
    waiting = time.monotonic()
    until(lambda: time.monotonic() - waiting > 0.05)
    held = time.monotonic() - waiting
    fifo.release()
    for future in (first, second, equal):
        future.result(PATIENCE)
    taken = time.monotonic() - begun
    assert first.times.scored >= held
    for future in (second, equal):
        assert held <= future.times.waited <= sum(future.times[:2]) <= taken + 1e-6
    stats = pool.stats()
    assert stats.slice_sizes == {1: 1, 4: 1}
    assert stats.slices == 2
    assert second.times.tokenized is None


def test_a_future_knows_how_long_its_request_was_tokenized_where_models_tell(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("counting", loader="fakes:load_counting"), slice_tokens=100, workers=1)
    future: Any = pool.submit("query", [f"{i} " + "word " * 60 for i in range(4)])
    future.result(PATIENCE)
    assert future.times.tokenized == 0.125 * pool.stats().slices > 0.125


def test_one_that_sleeps_delays_nobody(held: tuple[RerankerPool, Future[Any]], fifo: Fifo) -> None:
    pool, future = held
    wake = threading.Event()
    slept = threading.Event()

    def sleep(_: Future[Any]) -> None:
        slept.set()
        wake.wait(PATIENCE)

    for _ in range(20):
        future.add_done_callback(sleep)
    fifo.release()
    assert slept.wait(PATIENCE)
    for i in range(10):
        assert pool.rerank(f"query {i}", documents(10)) == ranked(f"query {i}", documents(10))
    wake.set()


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(3), KeyboardInterrupt()], ids=repr)
def test_one_that_raises_breaks_nobody(
    held: tuple[RerankerPool, Future[Any]], fifo: Fifo, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    pool, future = held

    def fail(_: Future[Any]) -> None:
        raise error

    called = threading.Event()
    future.add_done_callback(fail)
    future.add_done_callback(lambda _: called.set())
    fifo.release()
    assert called.wait(PATIENCE)
    assert pool.rerank("query", documents(10)) == ranked("query", documents(10))
    pool.close()
    until(lambda: "a done-callback raised" in caplog.text)
    assert all(record.levelno == logging.ERROR for record in caplog.records if "callback" in record.message)


def test_one_may_submit_and_wait(held: tuple[RerankerPool, Future[Any]], fifo: Fifo) -> None:
    """A chain of a hundred requests, each submitted and awaited in the callback of the one before."""
    pool, future = held
    finished: Future[Any] = Future()

    def again(done: Future[Any], left: int = 100) -> None:
        try:
            assert done.exception() is None
            if left == 0:
                finished.set_result(pool.rerank("query", documents(5)))
            else:
                pool.submit(f"query {left}", documents(3)).add_done_callback(lambda f: again(f, left - 1))
        except BaseException as error:
            finished.set_exception(error)

    future.add_done_callback(again)
    fifo.release()
    assert finished.result(PATIENCE) == ranked("query", documents(5))


@pytest.mark.parametrize("drain", [True, False])
def test_one_may_close_the_pool(held: tuple[RerankerPool, Future[Any]], fifo: Fifo, drain: bool) -> None:
    pool, future = held
    closed = threading.Event()

    def close(_: Future[Any]) -> None:
        pool.close(drain=drain)
        closed.set()

    future.add_done_callback(close)
    others = [pool.submit(f"query {i}", documents(30)) for i in range(20)]
    fifo.release()
    assert closed.wait(PATIENCE)
    for i, other in enumerate(others):
        error = other.exception(0)
        assert isinstance(error, PoolClosedError) if error else other.result() == ranked(f"query {i}", documents(30))
    if drain:
        assert all(other.exception() is None for other in others)
    assert [info.state for info in pool.workers()] == ["closed"]


@pytest.mark.parametrize(
    ("document", "error"), [("!raise no", ScoringError), ("!os._exit 1", WorkerCrashedError), ("cancel me", None)]
)
def test_failures_and_cancellations_have_callbacks_that_may_submit_too(
    make_pool: MakePool, fifo: Fifo, document: str, error: type[Exception] | None
) -> None:
    """Submitting in the callback of a broken executor is what deadlocks in Python 3.12 and 3.13."""
    with make_pool(workers=1) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        future = pool.submit("query", [document])
        inner: Future[Any] = Future()

        def submit(done: Future[Any]) -> None:
            inner.set_result(pool.rerank("query", documents(5)))

        future.add_done_callback(submit)
        if error is None:
            fifo.release()
            future.cancel()
        else:
            fifo.release()
            assert isinstance(future.exception(PATIENCE), error)
        assert inner.result(PATIENCE) == ranked("query", documents(5))


def test_one_that_is_added_late_runs_at_once(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        future = pool.submit("query", documents(3))
        future.result(PATIENCE)
        called = []
        future.add_done_callback(called.append)
        assert called == [future]


def test_one_that_kills_the_workers(held: tuple[RerankerPool, Future[Any]], fifo: Fifo) -> None:
    pool, future = held

    def kill(_: Future[Any]) -> None:
        for info in pool.workers():
            if info.pid is not None:
                psutil.Process(info.pid).kill()

    future.add_done_callback(kill)
    fifo.release()
    assert pool.rerank("query", documents(50)) == ranked("query", documents(50))


def test_without_a_thread_to_be_had_a_callback_still_runs(
    held: tuple[RerankerPool, Future[Any]], fifo: Fifo, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, future = held
    start = threading.Thread.start
    called: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "mp_rerank-callback":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    future.add_done_callback(lambda _: called.append(threading.current_thread().name))
    fifo.release()
    future.result(PATIENCE)
    assert pool.rerank("query", documents(3))
    assert called == ["mp_rerank-dispatcher"]


def test_asyncio_s_own_callbacks_come_from_another_thread(held: tuple[RerankerPool, Future[Any]], fifo: Fifo) -> None:
    pool, future = held

    async def agent() -> Any:
        wrapped = asyncio.wrap_future(future)
        fifo.release()
        return await wrapped

    assert asyncio.run(agent()) == ranked("query", documents(3))
    assert pool.stats().completed == 2
