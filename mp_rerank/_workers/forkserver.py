"""A process that has done the heavy imports and forks workers from then on (``start_method="forkserver"``).

The first start pays for the imports once, for all workers; each later one takes the time that loading the model takes,
and shares the imported code's memory. One server serves every pool of this process, for as long as one is open. It is
not multiprocessing's own, which belongs to the program: that one would lend other people's children what is imported
and set here.
"""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.connection import wait
from typing import Any

__all__ = ["Popen", "lease", "release"]

PRELOADED = ["mp_rerank._workers.preload"]


def lease() -> None:
    """Keep the server, which starts with the first worker asked of it, until ``release``."""
    _server.lease()


def release() -> None:
    """Give a lease back; the server ends with the last one."""
    _server.release()


class Popen(popen_forkserver.Popen):
    """A worker process forked by the server."""

    def __init__(self, process: Any) -> None:
        self._reading = threading.Lock()
        _asking.for_worker = True
        try:
            super().__init__(process)
        finally:
            _asking.for_worker = False

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        # The exit code comes down a pipe, once: a second thread that reads would take the end of the pipe for the
        # server's death.
        if flag != os.WNOHANG:
            wait([self.sentinel])
        with self._reading:
            code: int | None = super().poll(os.WNOHANG)
            return code


class _Server:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._owner = os.getpid()
        self._leases = 0
        self._standard: Any = forkserver.ForkServer()
        self._standard.set_forkserver_preload(PRELOADED)

    def lease(self) -> None:
        with self._lock:
            if os.getpid() != self._owner:  # a fork has the old one's numbers, but it is not its child
                self._begin()
            self._leases += 1

    def release(self) -> None:
        with self._lock:
            if os.getpid() != self._owner:
                return
            self._leases -= 1
            if self._leases == 0:
                self._end()

    def _end(self) -> None:
        pid = self._standard._forkserver_pid
        if pid is not None:
            # Asked nicely it would wait until every copy of its pipe is closed, a fork's of this process too.
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            with suppress(OSError):
                self._standard._stop()
        self._begin()

    def connect(self, fds: list[int]) -> tuple[int, int]:
        try:
            pipes: tuple[int, int] = self._standard.connect_to_new_process(fds)
        except ConnectionError:  # it is just dying; once it has, another is started
            with suppress(OSError):
                os.waitid(os.P_PID, self._standard._forkserver_pid, os.WEXITED | os.WNOWAIT)
            pipes = self._standard.connect_to_new_process(fds)
        return pipes


_server = _Server()
_asking = threading.local()
_connect_to_standard = forkserver.connect_to_new_process


def _connect(fds: list[int]) -> tuple[int, int]:
    """Ours while this thread starts a worker: multiprocessing has no setting for which server a process comes from."""
    if getattr(_asking, "for_worker", False):
        return _server.connect(fds)
    pipes: tuple[int, int] = _connect_to_standard(fds)
    return pipes


forkserver.connect_to_new_process = _connect  # type: ignore[assignment]
