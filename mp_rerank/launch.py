"""Starting and ending one worker: an executor of one, on a process or on a thread.

A worker process is spawned without the caller's main module: it needs nothing from it, so a script or a notebook
without an ``if __name__ == "__main__":`` guard works, and a heavy main module costs the workers nothing.
"""

from __future__ import annotations

import logging
import multiprocessing.process
import multiprocessing.spawn
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, Protocol

import psutil

from mp_rerank import worker
from mp_rerank.config import ModelSpec
from mp_rerank.logs import WORKER_LOGGER, repeat_logs

__all__ = ["ProcessWorker", "ThreadWorker", "Worker", "check_may_spawn"]

# A worker told to leave is killed after so many seconds: it has nothing to lose.
GRACE_SECONDS = 5.0


class Worker(Protocol):
    """One worker, of whichever kind: what a slot needs of it."""

    executor: Executor
    described: Future[worker.WorkerFacts]
    pid: int | None

    @property
    def alive(self) -> bool:
        """Whether there is still something to wait for in ``join``."""

    def kill(self) -> None:
        """End it now, whatever it is doing; without effect on a thread, or once it has ended."""

    def retire(self) -> None:
        """Take no more work, finish the running slice, end; killed after a grace. Returns at once."""

    def join(self, timeout: float) -> None:
        """Wait until it has ended, at most ``timeout`` seconds."""


class ProcessWorker:
    """A spawned process in a ``ProcessPoolExecutor(1)``.

    Args:
        name: what its logs and its process are called.
        spec, device, threads, batch_tokens, offline: for ``worker.initialize_process``.
        on_exit: called on a thread of its own with the exit code, once, when the process has ended, for whatever
            reason.

    Raises:
        OSError: the system would not start another process.
    """

    def __init__(
        self,
        name: str,
        spec: ModelSpec,
        device: str,
        threads: int,
        batch_tokens: int,
        *,
        offline: bool,
        on_exit: Callable[[int | None], None],
    ) -> None:
        self.name = name
        self._context = _WorkerContext(name)
        logs, child_logs = self._context.Pipe(duplex=False)
        level = logging.getLogger(WORKER_LOGGER).getEffectiveLevel()
        self.executor: Executor = ProcessPoolExecutor(
            max_workers=1,
            mp_context=self._context,
            initializer=worker.initialize_process,
            initargs=(pickle.dumps(spec), device, threads, batch_tokens, child_logs, level, offline),
        )
        try:
            self.described = self.executor.submit(worker.describe)  # this starts the process
        except BaseException:
            logs.close()
            self.executor.shutdown(wait=False)
            raise
        finally:
            child_logs.close()  # the child's own copy is then the only one, and its death is the pipe's end
        started = self._context.started
        assert started is not None
        assert started.pid is not None
        self._started = started
        self.pid: int | None = started.pid
        self._psutil = _psutil_process(started.pid)
        self._overdue = threading.Timer(GRACE_SECONDS, self.kill)
        self._overdue.daemon = True
        self._watch = threading.Thread(target=self._watch_exit, args=(logs, on_exit), name=f"{name}-watch", daemon=True)
        self._watch.start()

    @property
    def alive(self) -> bool:
        return self._watch.is_alive()

    def kill(self) -> None:
        if self._psutil is not None:
            try:
                self._psutil.kill()  # by pid and creation time: never a stranger that was given the same pid
            except psutil.Error:
                pass

    def retire(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)
        if self._watch.is_alive():
            self._overdue.start()

    def join(self, timeout: float) -> None:
        self._watch.join(timeout)
        if self._overdue.is_alive() and not self._watch.is_alive():
            self._overdue.join()  # it has been cancelled

    def _watch_exit(self, logs: Connection, on_exit: Callable[[int | None], None]) -> None:
        repeat_logs(logs, self.name)
        logs.close()
        wait([self._started.sentinel])
        # The executor's own thread waits for the process too, and only one of two waiters is given the exit code; the
        # other sees it a moment later.
        exit_code = self._started.exitcode
        for _ in range(100):
            if exit_code is not None:
                break
            threading.Event().wait(0.01)
            exit_code = self._started.exitcode
        self._overdue.cancel()
        on_exit(exit_code)


class ThreadWorker:
    """A thread of this process in a ``ThreadPoolExecutor(1)``: one model, one prediction at a time."""

    def __init__(self, name: str, spec: ModelSpec, device: str, threads: int | None, batch_tokens: int) -> None:
        self.executor: Executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix=name,
            initializer=worker.initialize,
            initargs=(pickle.dumps(spec), device, threads, batch_tokens),
        )
        self.described = self.executor.submit(worker.describe)
        self.pid: int | None = os.getpid()

    @property
    def alive(self) -> bool:
        """The thread ends by itself after the slice it is running; nothing waits for it."""
        return False

    def kill(self) -> None:
        """A thread cannot be killed."""

    def retire(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)

    def join(self, timeout: float) -> None:
        """See ``alive``."""


def check_may_spawn() -> None:
    """Raise ``RuntimeError`` where starting workers would be wrong, and say why.

    Inside a worker a pool would multiply itself; while a child of ``multiprocessing`` is still importing its main
    module, every child would start children of its own; and a daemonic process may have none.
    """
    if worker.in_worker_process():
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
    """A spawned process that does not run the parent's main module."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        _launching.without_main = True
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            _launching.without_main = False


class _WorkerContext(SpawnContext):
    """The spawn context of one executor, which makes one process: ``started``."""

    def __init__(self, name: str) -> None:
        self.worker_name = name
        self.started: multiprocessing.process.BaseProcess | None = None

    def Process(self, *, target: Any, args: Any) -> multiprocessing.process.BaseProcess:  # type: ignore[override]
        self.started = _WorkerProcess(target=target, args=args, name=self.worker_name)
        return self.started


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
