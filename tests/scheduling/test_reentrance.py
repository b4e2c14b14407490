"""User code gets everywhere: signal handlers, finalizers, log handlers. Nothing of ours waits for itself there."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Fifo, ranked, until
from interrupts import at_moment

from mp_rerank import PoolClosedError, RerankerPool
from mp_rerank._scheduling.futures import PoolFuture
from mp_rerank._workers import logs

MakePool = Callable[..., RerankerPool]
ROOT = Path(__file__).parents[2]


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


# A signal handler, at every moment of a call.


CALLS: dict[str, Callable[[RerankerPool], object]] = {
    "submit": lambda pool: pool.submit("query", documents(3)).result(PATIENCE),
    "rerank": lambda pool: pool.rerank("query", documents(3)),
    "cancel": lambda pool: pool.submit("query", documents(3)).cancel(),
    "stats": lambda pool: pool.stats(),
    "stream": lambda pool: list(pool.stream("query", documents(3))),
    "stream, left early": lambda pool: next(pool.stream("query", documents(3))),
}
HANDLERS: dict[str, Callable[[RerankerPool], object]] = {
    "stats": lambda pool: pool.stats(),
    "submit": lambda pool: pool.rerank("query", documents(2)),
    "stream": lambda pool: list(pool.for_caller("handler").stream("query", documents(2))),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bound", [1, 1000], ids=["at the bound", "far from it"])
def test_a_handler_may_use_the_pool_at_any_moment_of_a_call(
    make_pool: MakePool, call: str, handler: str, bound: int
) -> None:
    with make_pool(isolation="thread", max_pending_pairs=bound) as pool:  # no moment of the caller's is a worker's
        for moment in range(1, 1000, 1 if bound == 1 else 3):
            if not at_moment(partial(CALLS[call], pool), moment, partial(HANDLERS[handler], pool)):
                break
        assert 5 < moment < 999
        assert pool.rerank("query", documents(3)) == ranked("query", documents(3))


@pytest.mark.parametrize("call", ["submit", "rerank", "stats"])
def test_a_handler_may_close_the_pool_at_any_moment_of_a_call(make_pool: MakePool, call: str) -> None:
    with make_pool(isolation="thread"):
        pass  # the modules that a first pool imports are no moments of the call
    for moment in range(1, 400, 7):
        pool = make_pool(isolation="thread").start()  # a new pool each time: processes would take most of it

        def until_closed(pool: RerankerPool = pool) -> None:
            with suppress(PoolClosedError):
                CALLS[call](pool)

        came_that_far = at_moment(until_closed, moment, pool.close)
        pool.close()
        if not came_that_far:
            break
    assert 5 < moment < 399


@pytest.mark.parametrize("handler", ["close", "rerank"])
def test_a_handler_may_use_or_close_the_pool_at_any_moment_of_its_start(make_pool: MakePool, handler: str) -> None:
    for moment in range(1, 1000, 29):
        pool = make_pool(workers=1)

        def handle(pool: RerankerPool = pool) -> None:
            with suppress(PoolClosedError):
                pool.close() if handler == "close" else pool.rerank("query", documents(2))

        def start(pool: RerankerPool = pool) -> None:
            with suppress(PoolClosedError):
                pool.start()

        came_that_far = at_moment(start, moment, handle)
        pool.close()
        if not came_that_far:
            break
    assert 5 < moment < 999


SIGTERM_CLOSES = """
import os, signal, sys, threading, time
from mp_rerank import ModelSpec, PoolClosedError, RerankerPool

pool = RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1, max_pending_pairs=20).start()
signal.signal(signal.SIGTERM, lambda *_: (pool.close(), print("closed", flush=True)))
threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
try:
    while True:
        pool.submit("query", [f"document {i}" for i in range(7)])
except PoolClosedError:
    print("left")
"""


def test_sigterm_closes_a_pool_while_the_main_thread_submits() -> None:
    for _ in range(5):
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
        done = subprocess.run(
            [sys.executable, "-c", SIGTERM_CLOSES], env=environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert (done.stdout.split(), done.stderr) == (["closed", "left"], "")


# A finalizer, on threads of ours.


class Cycle:
    """Garbage that does something when it is found, on whatever thread finds it."""

    def __init__(self, end: Callable[[], object]) -> None:
        self.end = end
        self.self = self

    def __del__(self) -> None:
        self.end()


def on_the_dispatcher_s_thread(pool: RerankerPool, act: Callable[[], object]) -> None:
    dispatcher = pool._dispatcher
    assert dispatcher is not None
    dispatcher._put(_ask(act))  # as a finalizer would run there


def _ask(act: Callable[[], object]) -> Any:
    from mp_rerank._scheduling.dispatcher import _Ask
    from mp_rerank._scheduling.futures import Answer

    return _Ask(act, Answer())


def test_a_finalizer_on_the_dispatcher_s_thread_is_answered_at_once(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        seen: list[object] = []
        on_the_dispatcher_s_thread(pool, lambda: seen.append(pool.stats()))
        on_the_dispatcher_s_thread(pool, lambda: seen.append(len(pool.workers())))
        on_the_dispatcher_s_thread(pool, lambda: seen.append(pool.submit("query", documents(2))))
        until(lambda: len(seen) == 3)
        assert seen[2].result(PATIENCE) == ranked("query", documents(2))  # type: ignore[attr-defined]


def test_waiting_for_the_pool_on_a_thread_of_it_is_an_error_and_no_hang(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                pool.rerank("query", documents(2))
            except RuntimeError as error:
                errors.append(error)

        on_the_dispatcher_s_thread(pool, wait)
        until(lambda: len(errors) == 1)
        assert "belongs to a RerankerPool, and would wait for itself" in str(errors[0])
        on_the_dispatcher_s_thread(pool, pool.close)  # ends it, and does not wait for that
        until(lambda: pool.workers()[0].state == "closed")


def test_garbage_may_ask_submit_and_close_wherever_it_is_found(make_pool: MakePool) -> None:
    threshold = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    found: list[str] = []
    try:
        with make_pool(workers=1) as pool:
            other = make_pool(workers=1).start()

            def end() -> None:
                found.append(threading.current_thread().name)
                pool.stats()
                pool.submit("query", ["document"])
                other.close()

            for i in range(300):
                Cycle(end)
                assert pool.rerank(f"query {i}", documents(2)) == ranked(f"query {i}", documents(2))
    finally:
        gc.set_threshold(*threshold)
    assert len(found) > 10


# A log handler.


class Handler(logging.Handler):
    def __init__(self, act: Callable[[], object]) -> None:
        super().__init__()
        self.act = act

    def emit(self, record: logging.LogRecord) -> None:
        self.act()


@contextmanager
def handler_of(name: str, act: Callable[[], object]) -> Iterator[None]:
    handler = Handler(act)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def test_a_log_handler_may_ask_the_pool(make_pool: MakePool, tmp_path: Path) -> None:
    seen: list[int] = []
    with make_pool(workers=1) as pool, handler_of("mp_rerank.pool", lambda: seen.append(pool.stats().crashes)):
        pool.rerank("query", [f"!once {tmp_path / 'mark'} !os._exit 5"])
        until(lambda: bool(seen))


def test_a_log_handler_that_blocks_delays_no_result_no_deadline_and_no_close(
    make_pool: MakePool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mp_rerank.pool.LOG_SECONDS", 0.05)
    wake = threading.Event()
    try:
        with (
            handler_of("mp_rerank.pool", wake.wait),
            handler_of("mp_rerank.worker", wake.wait),
            make_pool(workers=1, hang_timeout=5.0) as pool,
        ):
            pool.rerank("query", [f"!once {tmp_path / 'mark'} !os._exit 5"])
            # More than a pipe holds: the worker is heard all the same, and never takes long enough to be killed.
            for i in range(100):
                pool.rerank("query", [f"!say {i} {'word ' * 500}"])
            assert pool.stats().crashes == 1
    finally:
        wake.set()
    logs.flush(PATIENCE)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), ValueError("mine")], ids=repr)
def test_a_log_handler_that_raises_ends_nothing(make_pool: MakePool, tmp_path: Path, error: BaseException) -> None:
    def fail() -> None:
        raise error

    with handler_of("mp_rerank.pool", fail), make_pool(workers=1) as pool:
        pool.rerank("query", [f"!once {tmp_path / 'mark'} !os._exit 5"])
        assert pool.rerank("query", documents(2)) == ranked("query", documents(2))


def test_records_that_a_handler_is_too_slow_for_are_counted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logs, "MAX_QUEUED", 3)
    wake = threading.Event()
    logger = logs.QueuedLogger("mp_rerank.pool")
    with handler_of("mp_rerank.pool", wake.wait):
        for i in range(10):
            logger.warning("record %d", i)
        wake.set()
        logs.flush(PATIENCE)
    assert "log records were dropped" in caplog.text


# A future.


def test_a_future_that_is_cancelled_by_halves_is_cancelled_whole() -> None:
    """Whoever cancels may be interrupted in the middle: the pool, when it comes to resolve it, does the rest."""
    future = PoolFuture()
    called: list[object] = []
    future.add_internal_callback(called.append)
    assert future._decide("cancelled")
    assert not future.claim()
    assert future.cancelled()
    assert called == [future]


def test_a_future_is_cancelled_or_resolved_and_not_both(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        waiting = pool.submit("query", documents(3))
        assert waiting.cancel()
        assert waiting.cancel()
        fifo.release()
        assert held.result(PATIENCE)
        assert not held.cancel()
        assert not held.cancelled()


def test_a_caller_s_thread_may_have_a_name_like_ours(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool, ThreadPoolExecutor(1, thread_name_prefix="mp_rerank-agents") as agents:
        found = agents.submit(pool.rerank, "query", documents(2)).result(PATIENCE)
        assert found == ranked("query", documents(2))
