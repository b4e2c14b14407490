"""A worker in a process of its own: a ``ProcessPoolExecutor(1)``, spawned or forked by the server.

A worker process starts without the caller's main module: it needs nothing from it. So a script or a notebook without an
``if __name__ == "__main__":`` guard works, and a heavy main module costs the workers nothing.
"""

from __future__ import annotations

import concurrent.futures.process
import logging
import multiprocessing.process
import multiprocessing.spawn
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

import psutil

from mp_rerank._workers import child
from mp_rerank._workers.child import Launch, Pairs, Scored, WorkerFacts
from mp_rerank._workers.logs import WORKER_LOGGER, repeat_log

__all__ = ["ProcessHandle", "check_may_spawn"]


class ProcessHandle:
    """A worker in a process. See ``handle.WorkerHandle``.

    Args:
        launch: what to start.
        start_method: ``"spawn"`` or ``"forkserver"``; for the latter somebody holds a lease on the server.
        on_exit: called on a thread of its own with the exit code, once, when the process has ended, for whatever
            reason.

    Raises:
        OSError, RuntimeError: the system would start no other process, or no other thread.
    """

    killable = True

    def __init__(self, launch: Launch, start_method: str, on_exit: Callable[[int | None], None]) -> None:
        self.name = name = launch.name
        context = _WorkerContext(name, start_method)
        logs, child_logs = context.Pipe(duplex=False)
        level = logging.getLogger(WORKER_LOGGER).getEffectiveLevel()
        self._executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=context,
            initializer=child.initialize_process,
            initargs=(launch, child_logs, level),
        )
        self._watch = threading.Thread(target=self._watch_exit, args=(on_exit,), name=f"{name}-watch", daemon=True)
        self._logs = threading.Thread(target=self._repeat_logs, args=(logs,), name=f"{name}-logs", daemon=True)
        self._shutdown = threading.Thread(target=self._shut_down, name=f"{name}-shutdown", daemon=True)
        try:
            self.described: Future[WorkerFacts] = self._executor.submit(child.describe)  # this starts the process
            assert context.started is not None
            self._started = context.started
            assert self._started.pid is not None
            self.pid: int | None = self._started.pid
            self._psutil = _psutil_process(self._started.pid)
            self._watch.start()
            self._logs.start()
        except BaseException:
            if context.started is not None and context.started.pid is not None:
                context.started.kill()
            self._executor.shutdown(wait=False)
            if self._logs.ident is None:
                logs.close()
            raise
        finally:
            child_logs.close()  # the child's own copy is then the only one, and its death is the pipe's end

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in (self._watch, self._logs, self._shutdown))

    def score(self, pairs: Pairs) -> Future[Scored]:
        return self._executor.submit(child.score, pairs)

    def resident_bytes(self) -> int | None:
        try:
            return None if self._psutil is None else int(self._psutil.memory_info().rss)
        except psutil.Error:  # it has ended
            return None

    def kill(self) -> None:
        if self._psutil is not None:
            try:
                self._psutil.kill()  # by pid and creation time: never a stranger that was given the same pid
            except psutil.Error:
                pass

    def retire(self) -> None:
        try:
            self._shutdown.start()
        except RuntimeError:  # the system has no thread left
            self._executor.shutdown(wait=False, cancel_futures=True)

    def abandon(self) -> None:
        # What the standard library waits for as the interpreter exits: the executor's thread, and every child.
        manager = getattr(self._executor, "_executor_manager_thread", None)
        concurrent.futures.process._threads_wakeups.pop(manager, None)
        multiprocessing.process._children.discard(self._started)  # type: ignore[attr-defined]

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for thread in (self._watch, self._logs, self._shutdown):
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    def _shut_down(self) -> None:
        # Waits for the executor's own thread, for which nobody else would: it is a daemon like the one that made it,
        # and an interpreter that exits in the middle of its freeing semaphores is told that they have leaked.
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _repeat_logs(self, logs: Connection) -> None:
        # Apart from the watch: a log handler of the caller's may block. Its end is the pipe's or the process's, since
        # a fork of this process may hold the pipe open.
        while logs in wait([logs, self._started.sentinel]) and repeat_log(logs, self.name):
            pass
        logs.close()

    def _watch_exit(self, on_exit: Callable[[int | None], None]) -> None:
        process = self._started
        try:
            # Without reaping it. The sentinel alone would not do: a fork of this process, made while the worker was
            # being started, holds the far end of it open.
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[arg-type]
        except (AttributeError, OSError):  # not on this system, or reaped by the executor's own thread
            wait([process.sentinel])
        # Only one of two waiters is given the exit code; the other sees it a moment later.
        for _ in range(100):
            if process.exitcode is not None:
                break
            threading.Event().wait(0.01)
        self.kill()  # a fork server that dies takes its children's exit codes along, not the children
        process.join(0.0)  # multiprocessing keeps it, and its files, until somebody has joined it
        on_exit(process.exitcode)


def check_may_spawn() -> None:
    """Raise ``RuntimeError`` where starting workers would be wrong, and say why.

    Inside a worker a pool would multiply itself; while a child of ``multiprocessing`` is still importing its main
    module, every child would start children of its own; and a daemonic process may have none.
    """
    if child.in_worker_process():
        raise RuntimeError("this is a worker of a RerankerPool: a pool cannot be started inside one")
    current = multiprocessing.process.current_process()
    if getattr(current, "_inheriting", False):
        raise RuntimeError(
            "a RerankerPool cannot be started while a multiprocessing child is importing its main module; another "
            'library spawned this process: put the code that starts the pool under if __name__ == "__main__":'
        )
    if current.daemon:
        raise RuntimeError("a RerankerPool cannot be started in a daemonic process: it may have no children")


def _psutil_process(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:  # it has ended already
        return None


class _WorkerProcess(SpawnProcess):
    """A process that does not run the parent's main module; spawned, or forked by the server."""

    by_server = False

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        _launching.without_main = True
        try:
            with _interrupts_blocked():
                if process_obj.by_server:
                    from mp_rerank._workers import forkserver

                    return forkserver.Popen(process_obj)
                return SpawnProcess._Popen(process_obj)
        finally:
            _launching.without_main = False

    def start(self) -> None:
        tasks, results = self._args[:2]  # type: ignore[attr-defined]
        super().start()
        _processes.add(self)
        # What only the worker uses of its two pipes is closed here, so that its death is the end of both: with this
        # process's own copies open, a thread of the executor would wait for ever for somebody to read the rest of a
        # large task (Python 3.10), or to write the rest of a result that its writer died in.
        tasks._reader.close()
        results._writer.close()


class _WorkerContext(SpawnContext):
    """The context of one executor, which makes one process: ``started``."""

    def __init__(self, name: str, start_method: str) -> None:
        self.worker_name = name
        self.worker_start_method = start_method
        self.started: multiprocessing.process.BaseProcess | None = None

    def Process(self, *, target: Any, args: Any) -> multiprocessing.process.BaseProcess:  # type: ignore[override]
        self.started = process = _WorkerProcess(target=target, args=args, name=self.worker_name)
        process.by_server = self.worker_start_method == "forkserver"
        return process


_processes: weakref.WeakSet[_WorkerProcess] = weakref.WeakSet()


def _disown() -> None:
    """In a fork of this process: its workers are not the fork's children, to be waited for when that exits."""
    for process in _processes:
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started within inherits the mask: Ctrl-C never reaches it, not even while its interpreter starts.

    For the moment of the start only, and not the dispatcher's thread for good: multiprocessing unblocks the signal when
    it starts its resource tracker, as it does for an executor's first semaphore.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_launching = threading.local()
_preparation_data = multiprocessing.spawn.get_preparation_data


def _preparation_data_without_main(name: str) -> dict[str, Any]:
    """What a spawned child is told about its parent, without the main module where this thread launches a worker.

    multiprocessing has no setting for it. The function is replaced once, for every thread, and is the original for all
    who are not launching a worker: nothing is swapped back and forth under other threads.
    """
    data: dict[str, Any] = _preparation_data(name)
    if getattr(_launching, "without_main", False):
        data.pop("init_main_from_name", None)
        data.pop("init_main_from_path", None)
    return data


multiprocessing.spawn.get_preparation_data = _preparation_data_without_main
