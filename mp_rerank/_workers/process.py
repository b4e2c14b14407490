"""A worker in a process of its own: a ``ProcessPoolExecutor(1)``, spawned, or forked by the server or a template.

Making a ``ProcessHandle`` takes no time. One thread of the handle starts the process and stays with it:

    watch      starts the process -> waits until it has ended -> reports its exit code
    logs       hands what the worker says to the parent's ``logging``
    shutdown   from ``retire`` on: ends the executor

The system can tell a process that the *thread* which started it has ended. Workers have themselves killed then, even
where they are stopped. So the thread that starts a worker must not end before it: that is why watching and starting are
one thread.
"""

from __future__ import annotations

import concurrent.futures.process
import logging
import multiprocessing.spawn
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

import psutil

from mp_rerank._recipe import Recipe
from mp_rerank._workers import child, stdlib_names
from mp_rerank._workers.child import Launch, Options, Pairs, Scored, WorkerFacts
from mp_rerank._workers.green import let_files_close, threads_are_green
from mp_rerank._workers.launching import LaunchError, TemplateDiedError, WorkerContext
from mp_rerank._workers.logs import WORKER_LOGGER, repeat_log
from mp_rerank._workers.surroundings import block_sigpipe, standard_descriptors
from mp_rerank.errors import ModelLoadError

__all__ = ["ProcessHandle"]

stdlib_names.check(stdlib_names.EVERYWHERE, "a worker process")

# Until the logs of a process that has ended are read as far as its first word.
FIRST_WORD_SECONDS = 5.0


class _Templates(Protocol):
    def popen(self, launch: Launch) -> Callable[[Any], Any]:
        """What forks the process of the worker ``launch``."""


class ProcessHandle:
    """A worker in a process. See ``handle.WorkerHandle``.

    Args:
        launch: what to start.
        start_method: ``"spawn"``, or ``"forkserver"``, for which somebody holds a lease on the server, or
            ``"fork-model"``.
        templates: for ``"fork-model"``: of the model.
        on_exit: called on a thread of its own with the exit code, once, when the process has ended, for whatever
            reason. Not where ``loaded`` says that none was started.

    Attributes:
        loaded: the worker's first words; ``LaunchError`` where it came to none. Never given where the worker died
            on the way to them.

    Raises:
        RuntimeError: the system would start no other thread.
    """

    killable = True
    left = False

    def __init__(
        self,
        launch: Launch,
        start_method: str,
        on_exit: Callable[[int | None], None],
        templates: _Templates | None = None,
    ) -> None:
        self.name = name = launch.name
        self.loaded: Future[None] = Future()
        self.pid: int | None = None
        self._launch = launch
        self._start_method = start_method
        self._templates = templates
        self._on_exit = on_exit
        # Set by whoever wants the worker gone, and looked at once there is a process: no lock, since each writes first
        # and looks then, and what both then do may be done twice.
        self._unwanted = threading.Event()
        self._retired = False
        self._executor: ProcessPoolExecutor | None = None
        self._psutil: psutil.Process | None = None
        self._process: BaseProcess | None = None
        self._log_pipe: Connection | None = None
        self._began = False  # whether the process came to run anything of ours
        self._heard = threading.Event()  # set once ``_began`` is known
        self._watch = threading.Thread(target=self._live, name=f"{name}-watch", daemon=True)
        self._logs = threading.Thread(target=self._repeat_logs, name=f"{name}-logs", daemon=True)
        self._shutdown = threading.Thread(target=self._shut_down, name=f"{name}-shutdown", daemon=True)
        self._watch.start()

    @property
    def alive(self) -> bool:
        return any(thread.is_alive() for thread in (self._watch, self._logs, self._shutdown))

    def describe(self, recipe: Recipe | None) -> Future[WorkerFacts]:
        return self._launched().submit(child.describe, recipe)

    def score(self, pairs: Pairs, options: Options = None) -> Future[Scored]:
        return self._launched().submit(child.score, pairs, options)

    def _launched(self) -> ProcessPoolExecutor:
        if self._executor is None:
            raise RuntimeError("the worker is still being launched")
        return self._executor

    def resident_bytes(self) -> int | None:
        try:
            return None if self._psutil is None else int(self._psutil.memory_info().rss)
        except psutil.Error:  # it has ended
            return None

    def kill(self) -> None:
        self._unwanted.set()
        self._kill_process()

    def _kill_process(self) -> None:
        if self._psutil is not None:
            try:
                self._psutil.kill()  # by pid and creation time: never a stranger that was given the same pid
            except psutil.Error:
                pass

    def retire(self) -> None:
        self._retired = True
        if self._executor is None:
            self._unwanted.set()  # still being launched: it has nothing to finish
            return
        try:
            self._shutdown.start()
        except RuntimeError:  # the system has no thread left; or a second call
            self._executor.shutdown(wait=False, cancel_futures=True)

    def abandon(self) -> None:
        # What the standard library waits for as the interpreter exits: the executor's thread, and every child.
        manager = getattr(self._executor, "_executor_manager_thread", None)
        if manager is not None:  # none while it is being launched
            getattr(concurrent.futures.process, "_threads_wakeups", {}).pop(manager, None)
        getattr(multiprocessing.process, "_children", set()).discard(self._process)

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for thread in (self._watch, self._logs, self._shutdown):
            if thread.ident is not None:
                thread.join(max(0.0, deadline - time.monotonic()))

    # The watch.

    def _live(self) -> None:
        block_sigpipe()
        try:
            process = self._start()
        except BaseException as error:
            if self._unwanted.is_set():
                self._on_exit(-getattr(signal, "SIGKILL", 9))
            elif isinstance(error, TemplateDiedError) and error.began:
                self._on_exit(error.exit_code)
            elif isinstance(error, ModelLoadError):  # the template's
                self.loaded.set_exception(error)
            else:
                self.loaded.set_exception(self._launch_error(error))
            return
        # Whoever was here first has left word.
        if self._unwanted.is_set():
            self.kill()
        if self._retired:
            self.retire()
        code = self._wait_for_end(process)
        self._heard.wait(FIRST_WORD_SECONDS)
        if not self._began and not self._unwanted.is_set() and code is not None and code >= 0:
            self.loaded.set_exception(self._never_began("its process", f"exit code {code}"))
        else:
            self._on_exit(code)

    def _start(self) -> BaseProcess:
        context = WorkerContext(self.name, self._popen(), self._unwanted)
        level = logging.getLogger(WORKER_LOGGER).getEffectiveLevel()
        executor = None
        with standard_descriptors:
            self._log_pipe, child_logs = context.Pipe(duplex=False)
            try:
                executor = ProcessPoolExecutor(
                    max_workers=1,
                    mp_context=context,
                    initializer=child.initialize_process,
                    initargs=(self._launch, child_logs, level),
                )
                loaded = executor.submit(child.loaded)  # this starts the process
                assert context.started is not None
                self._process = context.started
                self._logs.start()
            except BaseException:
                if context.started is not None and context.started.pid is not None:
                    context.started.kill()
                    context.started.join()
                if executor is not None:
                    executor.shutdown(wait=False)
                self._log_pipe.close()
                raise
            finally:
                child_logs.close()  # the child's own copy is then the only one, and its death is the pipe's end
        let_files_close()
        self.pid = context.started.pid
        self._psutil = _psutil_process(context.started.pid)
        self._executor = executor
        loaded.add_done_callback(self._pass_on)
        return context.started

    def _popen(self) -> Callable[[Any], Any] | None:
        """What starts the process: none of ours where it is spawned."""
        if self._start_method == "spawn":
            return None
        if self._templates is not None:
            return self._templates.popen(self._launch)
        from mp_rerank._workers import forkserver  # not on every system

        return forkserver.Popen

    def _pass_on(self, loaded: Future[None]) -> None:
        """Give the worker's first words. A process that ended before them, or is given up, is the watch's to report."""
        if loaded.cancelled() or isinstance(error := loaded.exception(), BrokenExecutor):
            self._kill_process()
        elif error is not None:
            self.loaded.set_exception(error)
        else:
            self.loaded.set_result(None)

    def _wait_for_end(self, process: BaseProcess) -> int | None:
        """Wait until the process has ended; its exit code."""
        try:
            if threads_are_green():
                raise OSError("this would keep all of them from running")
            # Without reaping it. The sentinel alone would not do: a fork of this process, made while the worker was
            # being started, holds the far end of it open.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # type: ignore[arg-type]
        except (AttributeError, OSError):  # not on this system, or reaped by the executor's own thread
            wait([process.sentinel])
        # Only one of two waiters is given the exit code; the other sees it a moment later.
        for _ in range(100):
            if process.exitcode is not None:
                break
            threading.Event().wait(0.01)
        self._kill_process()  # a fork server that dies takes its children's exit codes along, perhaps not the children
        process.join(0.0)  # multiprocessing keeps it, and its files, until somebody has joined it
        popen: Any = process._popen  # type: ignore[attr-defined]
        return None if getattr(popen, "code_is_unknown", False) else process.exitcode

    def _launch_error(self, error: BaseException) -> LaunchError:
        of = LaunchError.of(error)
        if isinstance(error, BrokenPipeError) and self._start_method == "spawn":
            # The one who reads is multiprocessing's resource tracker, started before the worker and in the same way.
            return self._never_began("a helper of multiprocessing's", str(of), of.details)
        if isinstance(error, TemplateDiedError):
            return self._never_began("the template", f"exit code {error.exit_code}")
        if isinstance(error, ConnectionError) or "fork server" in str(error):
            return self._never_began("the fork server", str(of), of.details)
        return of

    def _never_began(self, who: str, how: str, details: str = "") -> LaunchError:
        said = f"{who} ended before it had begun ({how}); it was started as {_executable()}"
        if getattr(sys, "frozen", False):
            said += (
                ", which is this program, frozen: call multiprocessing.freeze_support() first thing in its main module"
            )
        else:
            said += ", and may have said why on the standard error"
        return LaunchError(said, hopeless=self._start_method == "spawn", details=details)

    # Other threads.

    def _shut_down(self) -> None:
        # Waits for the executor's own thread, for which nobody else would: it is a daemon like the one that made it,
        # and an interpreter that exits in the middle of its freeing semaphores is told that they have leaked.
        block_sigpipe()
        assert self._executor is not None
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _repeat_logs(self) -> None:
        # Apart from the watch: a log handler of the caller's may block. Its end is the pipe's or the process's, since
        # a fork of this process may hold the pipe open.
        assert self._log_pipe is not None
        assert self._process is not None
        logs, sentinel = self._log_pipe, self._process.sentinel
        try:
            self._began = logs in wait([logs, sentinel]) and logs.recv_bytes() == child.FIRST_WORD
        except (EOFError, OSError):  # it has ended
            pass
        self._heard.set()
        while self._began and logs in wait([logs, sentinel]) and repeat_log(logs, self.name):
            pass
        logs.close()
        let_files_close()


def _executable() -> str:
    return os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable or "?")


def _psutil_process(pid: int | None) -> psutil.Process | None:
    try:
        return None if pid is None else psutil.Process(pid)
    except psutil.Error:  # it has ended already
        return None
