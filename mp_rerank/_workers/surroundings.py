"""What holds while a worker, or the server that forks workers, is started.

    worker_surroundings     all of it, for the calling thread
    standard_descriptors    descriptors 0, 1 and 2 are open within
    block_sigpipe           for the life of a thread that writes to workers

A worker is told less about its parent than other children of multiprocessing are: not which main module to run, and no
directory that it could not enter. It has descriptors 0, 1 and 2, and never hears of Ctrl-C.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import util
from typing import Any

from mp_rerank._workers.green import threads_are_green
from mp_rerank._workers.stdlib_patches import replaced_on_this_thread

__all__ = ["block_sigpipe", "standard_descriptors", "worker_surroundings"]


@contextmanager
def worker_surroundings() -> Iterator[None]:
    """Within, this thread may start a worker, or the server that forks workers."""
    with (
        standard_descriptors,
        replaced_on_this_thread(multiprocessing.spawn, "get_preparation_data", _preparation_data),
        replaced_on_this_thread(util, "_args_from_interpreter_flags", _interpreter_flags),
        _interrupts_blocked(),
    ):
        yield


def _preparation_data(name: str) -> dict[str, Any]:
    """What a worker is told about its parent: ``multiprocessing.spawn.prepare`` does in the child what stands here."""
    # An empty entry means the directory that this process began in, if that was there.
    path = [multiprocessing.process.ORIGINAL_DIR if entry == "" else entry for entry in sys.path]  # type: ignore[attr-defined]
    data: dict[str, Any] = {
        "name": name,
        "authkey": multiprocessing.process.current_process().authkey,
        "log_to_stderr": getattr(util, "_log_to_stderr", False),
        "sys_path": [entry for entry in path if entry is not None],
        "sys_argv": sys.argv,
        "orig_dir": multiprocessing.process.ORIGINAL_DIR,  # type: ignore[attr-defined]
        "dir": _directory(),
    }
    logger = getattr(util, "_logger", None)
    if logger is not None:
        data["log_level"] = logger.getEffectiveLevel()
    method = multiprocessing.get_start_method(allow_none=True)
    if method is not None:
        data["start_method"] = method
    return data


def _interpreter_flags() -> list[str]:
    """Those of this process, for others that start in its directory."""
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if sys.version_info >= (3, 11) and "-P" not in flags:
        try:
            os.getcwd()
        except OSError:  # deleted: Python 3.13.0 fails where it looks for modules there
            flags = [*flags, "-P"]
    return flags


def _directory() -> str:
    """The current directory; the root where that was deleted, or may not be entered again."""
    try:
        directory = os.getcwd()
        if os.access(directory, os.X_OK):
            return directory
    except OSError:
        pass
    return os.path.abspath(os.sep)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started within inherits the mask: Ctrl-C never reaches it, not even while its interpreter starts.

    For the moment of the start only, and not the thread's life long: multiprocessing unblocks the signal when it starts
    its resource tracker, as it does for an executor's first semaphore.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def block_sigpipe() -> None:
    """Let this thread, and those it starts, get an error for writing to a worker that has died, not a signal.

    Python ignores the signal, but programs turn it on again, so as to end quietly under ``| head``: it would then end
    them. Each thread has a mask of its own, and the caller's threads keep theirs. Greenlets share the caller's.
    """
    if hasattr(signal, "pthread_sigmask") and not threads_are_green():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE})


class _StandardDescriptors:
    """Within, descriptors 0, 1 and 2 are open, here and in the processes that are started.

    Where one is closed, the next pipe gets its number, and the worker's output is redirected onto that pipe. So what is
    closed is opened on the null device, and closed again once no launch is under way.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._opened: list[int] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._open()
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._close()

    def forget(self) -> None:
        """In a fork: the launches under way are the parent's."""
        self._lock = threading.Lock()
        self._users = 0
        self._close()

    def _open(self) -> None:
        for descriptor in range(3):
            try:
                os.fstat(descriptor)
            except OSError:
                null = os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
                if null > 2:  # another thread was faster, and took it
                    os.close(null)
                    continue
                os.set_inheritable(null, True)
                self._opened.append(null)

    def _close(self) -> None:
        opened, self._opened = self._opened, []
        for descriptor in opened:
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(os.devnull)):  # still ours
                    os.close(descriptor)
            except OSError:
                pass


standard_descriptors = _StandardDescriptors()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: standard_descriptors.forget())
