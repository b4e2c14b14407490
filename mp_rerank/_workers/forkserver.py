"""A process that has done the heavy imports and forks workers from then on (``start_method="forkserver"``).

The first start pays for the imports once, for all workers; each later one takes the time that loading the model takes,
and shares the imported code's memory. One server serves every pool of this process, for as long as one is open. It is
not multiprocessing's own, which belongs to the program: that one would lend other people's children what is imported
and set here.

The server is started by a thread that stays until the server has ended: the system then kills the server with this
process, even while it imports. Whoever asks it for a worker may be kept waiting for its imports, and can give up. Of a
server that has been stopped (SIGSTOP) no worker would come: whoever waits for it tells it to go on.
"""

from __future__ import annotations

import io
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing import connection, context, forkserver, popen_forkserver, reduction, spawn, util
from multiprocessing.connection import wait
from typing import Any

import psutil

from mp_rerank._workers import stdlib_names
from mp_rerank._workers.green import threads_are_green
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank._workers.stdlib_patches import replaced_on_this_thread
from mp_rerank._workers.surroundings import worker_surroundings

__all__ = ["Popen", "lease", "release", "wait_unless_unwanted"]

logger = QueuedLogger(POOL_LOGGER)

stdlib_names.check(stdlib_names.FORKSERVER, "start_method='forkserver'")

# How long a server that takes no more workers is given to end.
DYING_SECONDS = 5.0
# How long an exit code may take from the server, once the worker has ended.
EXIT_CODE_SECONDS = 1.0
UNKNOWN_EXIT_CODE = 255
PRELOADED = ["mp_rerank._workers.preload"]
# How soon somebody who waits for the server gives up, once nobody wants the worker any more.
GIVE_UP_SECONDS = 0.1
# After how many such times somebody who waits looks whether the server was stopped: if twice in a row, it is to go on.
TIMES_A_LOOK = 10


def lease() -> None:
    """Keep the server, which starts with the first worker asked of it, until ``release``."""
    _server.lease()


def release() -> None:
    """Give a lease back; the server ends with the last one."""
    _server.release()


class Popen(popen_forkserver.Popen):
    """A worker process forked by the server.

    Its sentinel is a descriptor of the process itself (a *pidfd*, on Linux): so its end is noticed whatever has become
    of the server. Elsewhere it is the pipe of its exit code, which ends with the server.

    Attributes:
        code_is_unknown: whether its exit code never came from the server, which has ended or was stopped.

    Raises:
        RuntimeError: the server ended, or nobody wants the worker any more, before the server answered.
    """

    forker = "fork server"
    _fds: list[int]  # what the worker inherits

    def __init__(self, process: Any) -> None:
        self.code_is_unknown = False
        self._reading = threading.Lock()
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        # As multiprocessing has it, except for the server that is asked and for the end.
        told = io.BytesIO()
        context.set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process.name), told)
            reduction.dump(process, told)
        finally:
            context.set_spawning_popen(None)
        self.sentinel, to_child = self._connect(process)
        parent_alive = os.dup(to_child)  # the worker's sign that this process is there
        self.finalizer = util.Finalize(self, util.close_fds, (parent_alive, self.sentinel))  # type: ignore[attr-defined]
        with open(to_child, "wb") as pipe:
            pipe.write(told.getbuffer())
        wait_unless_unwanted(partial(wait, [self.sentinel]), process.unwanted, self._forked_by)
        try:
            self.pid = forkserver.read_signed(self.sentinel)
        except EOFError:
            raise RuntimeError(ended(self.forker)) from None
        self._codes = self.sentinel
        try:
            self.sentinel = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # not on this system; or it has ended already, and its exit code is there
            self.sentinel = os.dup(self._codes)
        util.Finalize(self, os.close, (self.sentinel,))

    def _connect(self, process: Any) -> tuple[int, int]:
        """Ask for a fork; the pipe that its pid and exit code come down, and the one to tell it what it is."""
        return _server.connect(self._fds, process.unwanted)

    def _forked_by(self) -> int | None:
        """The process that is asked for the fork, if there is one now."""
        return _server.pid()

    def poll(self, flag: int = os.WNOHANG) -> int | None:
        # The exit code comes down a pipe, once: a second thread that reads would take the end of the pipe for the
        # server's death.
        if self.returncode is None and wait([self.sentinel], 0.0 if flag == os.WNOHANG else None):
            with self._reading:
                if self.returncode is None:
                    self.returncode = self._read_code()
        return self.returncode

    def _read_code(self) -> int:
        with suppress(OSError, EOFError):
            if wait([self._codes], EXIT_CODE_SECONDS):
                return int(forkserver.read_signed(self._codes))
        with suppress(OSError):  # where this process has inherited it: it may be the container's first
            _, status = os.waitpid(self.pid, os.WNOHANG)
            return os.waitstatus_to_exitcode(status)
        self.code_is_unknown = True
        return UNKNOWN_EXIT_CODE


def ended(forker: str) -> str:
    return f"the {forker} ended before it had forked this worker"


def wait_unless_unwanted(
    is_there: Callable[[float], object], unwanted: threading.Event, pid: Callable[[], int | None]
) -> None:
    """Wait until the server has done something: it may still be importing.

    One who has given up closes the pipes. The worker that the server forks in the end finds itself without a parent,
    and leaves.

    Args:
        is_there: whether it has, at most so many seconds later.
        unwanted: set once nobody wants the worker any more: that is a ``RuntimeError``.
        pid: the server's, if there is one. A server that has been stopped (SIGSTOP) is told to go on.
    """
    stopped = None
    for times in itertools.count(1):
        if is_there(GIVE_UP_SECONDS):
            return
        if unwanted.is_set():
            raise RuntimeError("nobody wants this worker any more")
        if times % TIMES_A_LOOK:
            continue
        before, stopped = stopped, _stopped_child(pid())
        if stopped is not None and stopped == before:
            logger.warning(
                "process %d, which is to fork a worker, was stopped: it is told to go on "
                "[mp-rerank explain process-stopped]",
                stopped.pid,
            )
            with suppress(psutil.Error):
                stopped.resume()


def _stopped_child(pid: int | None) -> psutil.Process | None:
    """The child process ``pid`` of this one, if that has been stopped; not by a debugger, which will let it go on."""
    try:
        child = psutil.Process(pid) if pid is not None else None
        if child is not None and child.status() == psutil.STATUS_STOPPED and child.ppid() == os.getpid():
            return child
    except psutil.Error:
        pass
    return None


# Not a switch's own, that a second copy of this module would find in its place.
_answer_challenge = getattr(connection.answer_challenge, "__wrapped__", connection.answer_challenge)


def _answer_when_asked(unwanted: threading.Event, pipe: connection.Connection, key: bytes) -> None:
    """Prove to the server that we may ask (Python 3.14), which asks for it once it has done its imports."""
    wait_unless_unwanted(partial(wait, [pipe.fileno()]), unwanted, _server.pid)
    os.set_blocking(pipe.fileno(), True)  # gevent's sockets are not; what is left takes no time
    _answer_challenge(pipe, key)


class _ForkServer(forkserver.ForkServer):
    """multiprocessing's, started by a thread that stays with it."""

    def __init__(self) -> None:
        super().__init__()
        self._starting = threading.Lock()
        self._keeper: threading.Thread | None = None
        self.set_forkserver_preload(PRELOADED)

    def ensure_running(self) -> None:
        with self._starting:
            if self._keeper is not None and self._keeper.is_alive():
                return
            started = threading.Event()
            errors: list[BaseException] = []
            self._keeper = threading.Thread(
                target=self._keep, args=(started, errors), name="mp_rerank-server", daemon=True
            )
            self._keeper.start()
            started.wait()
            if errors:
                raise errors[0]

    def _keep(self, started: threading.Event, errors: list[BaseException]) -> None:
        try:
            with worker_surroundings():
                super().ensure_running()
        except BaseException as error:
            errors.append(error)
            return
        finally:
            started.set()
        if threads_are_green():
            return  # the thread they share stays anyway, and looking whether the server is alive costs little
        self._wait_for_end()

    def _wait_for_end(self) -> None:
        """Wait until the server has ended, and leave its exit code to whoever takes it."""
        with suppress(AttributeError, OSError, TypeError):
            os.waitid(os.P_PID, self._forkserver_pid, os.WEXITED | os.WNOWAIT)  # type: ignore[attr-defined]


class _Server:
    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._leases = 0
        self._standard: Any = _ForkServer()

    def lease(self) -> None:
        with self._lock:
            self._leases += 1

    def release(self) -> None:
        with self._lock:
            self._leases -= 1
            if self._leases == 0:
                self._end()

    def _end(self) -> None:
        standard = self._standard
        if standard._forkserver_pid is not None:
            # Asked nicely it would wait until every copy of its pipe is closed, a fork's of this process too.
            with suppress(OSError):
                os.kill(standard._forkserver_pid, signal.SIGKILL)
            with suppress(OSError):
                standard._stop()
        self._standard = _ForkServer()

    def pid(self) -> int | None:
        """The server's process, if there is one now."""
        pid: int | None = self._standard._forkserver_pid
        return pid

    def forget(self) -> None:
        """In a fork: the server is the parent's, and ends with that, not with this process."""
        if self._standard._forkserver_alive_fd is not None:
            with suppress(OSError):
                os.close(self._standard._forkserver_alive_fd)
        self._begin()

    def connect(self, fds: list[int], unwanted: threading.Event) -> tuple[int, int]:
        until = time.monotonic() + DYING_SECONDS
        while True:
            try:
                with replaced_on_this_thread(connection, "answer_challenge", partial(_answer_when_asked, unwanted)):
                    pipes: tuple[int, int] = self._standard.connect_to_new_process(fds)
                return pipes
            except EOFError:  # while it was importing
                raise RuntimeError(ended(Popen.forker)) from None
            except ConnectionError:
                # It is just dying, and may be another's by now: once it has ended, somebody starts another.
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)


_server = _Server()

os.register_at_fork(after_in_child=lambda: _server.forget())
