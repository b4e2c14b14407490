"""How the process of a worker is started: the context that an executor makes its one process with.

    WorkerContext    given to the executor; its process is a worker's
    MainlessProcess  a spawned process that does not run the parent's main module
    LaunchError      the system would not start the process, or the process never came to run anything of ours
    TemplateDiedError    the template that was to fork the worker ended while it loaded the model

Nothing here waits for long, except for a fork server that is still importing: that wait can be given up.
"""

from __future__ import annotations

import errno
import multiprocessing.process
import os
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from mp_rerank._workers.green import threads_are_green
from mp_rerank._workers.surroundings import worker_surroundings

__all__ = ["LaunchError", "MainlessProcess", "TemplateDiedError", "WorkerContext"]

# The system says these when it has too little of something, which may be otherwise a moment later.
PASSING_ERRORS = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EINTR)

F_SETPIPE_SZ = 1031  # of linux/fcntl.h; the module fcntl has had it since Python 3.10, but not everywhere
PIPE_BYTES = 2**20


class LaunchError(RuntimeError):
    """No worker came of a launch.

    Attributes:
        hopeless: whether another try would end in the same way.
        details: the traceback.
    """

    def __init__(self, message: str, *, hopeless: bool, details: str = "") -> None:
        super().__init__(message)
        self.hopeless = hopeless
        self.details = details

    @classmethod
    def of(cls, error: BaseException) -> LaunchError:
        """For ``error``, which is being handled."""
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return cls(words, hopeless=not _is_passing(error), details=traceback.format_exc().rstrip())


class TemplateDiedError(RuntimeError):
    """A template ended before it had loaded its model.

    Attributes:
        exit_code: its process's.
        began: whether it came to run anything of ours.
    """

    def __init__(self, exit_code: int | None, *, began: bool) -> None:
        super().__init__(f"the template ended while it was loading (exit code {exit_code})")
        self.exit_code = exit_code
        self.began = began


def _is_passing(error: BaseException) -> bool:
    """Whether what raised ``error`` may work in a moment: the system lacks something, or another process just died."""
    if isinstance(error, OSError):
        return error.errno is None or error.errno in PASSING_ERRORS or isinstance(error, ConnectionError)
    # RuntimeError: "can't start new thread".
    return isinstance(error, MemoryError | EOFError | RuntimeError)


class WorkerContext(SpawnContext):
    """The context of one executor, which makes one process: ``started``.

    Args:
        name: the worker's.
        popen: starts the process that it is given; ``None``: by spawning it.
        unwanted: set once nobody wants the worker any more; looked at while a fork server is waited for.
    """

    def __init__(self, name: str, popen: Callable[[Any], Any] | None, unwanted: threading.Event) -> None:
        self.worker_name = name
        self.popen = popen
        self.unwanted = unwanted
        self.started: _WorkerProcess | None = None

    def Process(self, *, target: Any, args: Any) -> multiprocessing.process.BaseProcess:  # type: ignore[override]
        self.started = process = _WorkerProcess(target=target, args=args, name=self.worker_name)
        process.popen = self.popen
        process.unwanted = self.unwanted
        return process


class MainlessProcess(SpawnProcess):
    """A process that does not run the parent's main module: spawned, or as ``popen`` starts it."""

    popen: Callable[[Any], Any] | None = None

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        with worker_surroundings():
            return (process_obj.popen or SpawnProcess._Popen)(process_obj)

    def start(self) -> None:
        super().start()
        _processes.add(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("popen", "unwanted"):  # the parent's
            state.pop(name, None)
        return state


class _WorkerProcess(MainlessProcess):
    unwanted: threading.Event

    def start(self) -> None:
        tasks, results = self._args[:2]  # type: ignore[attr-defined]
        super().start()
        # What only the worker uses of its two pipes is closed here, so that its death is the end of both: with this
        # process's own copies open, a thread of the executor would wait for ever for somebody to read the rest of a
        # large task (Python 3.10), or to write the rest of a result that its writer died in.
        tasks._reader.close()
        results._writer.close()
        if threads_are_green():
            _enlarge(tasks._writer.fileno())


def _enlarge(pipe: int) -> None:
    """Make room in ``pipe`` for the slices a worker has waiting (Linux): writing to a full one stops all greenlets."""
    try:
        import fcntl

        fcntl.fcntl(pipe, F_SETPIPE_SZ, PIPE_BYTES)
    except (ImportError, OSError):  # not on this system, or more than it lets us have
        pass


_processes: weakref.WeakSet[MainlessProcess] = weakref.WeakSet()


def _after_fork() -> None:
    """In a fork of this process: its workers are not the fork's children, to be waited for when that exits."""
    for process in _processes:
        getattr(multiprocessing.process, "_children", set()).discard(process)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
