"""A process that has loaded and proved a model, and forks workers from then on (``start_method="fork-model"``; Linux).

What takes long is done once: imports, loading, proofs, prepacking. A worker that is forked has all of it at once, and
shares its memory: what is its own are the pages that it writes to.

    Templates     of one model: one process for each set of CPUs that workers are kept on (a NUMA node)
    Template      one of them: the process that there is now, started when a worker is asked of it
    _Run          one process: started and watched to its end by a thread of its own, the keeper

A template that dies is made anew, and the workers that it has forked go on: this process watches each by a descriptor
of that process (a *pidfd*), not by a pipe that ends with the template. Their exit codes are lost with it. A template
that could not load the model ends, too: whoever waited for it is given the error, and the next worker that is asked for
makes another try.

The template is the workers' parent, and so it ends after them when the pool is closed. It ends at once with the process
that started it. The child's side is in ``template_child``.
"""

from __future__ import annotations

import logging
import multiprocessing.process
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing import connection, context, reduction, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from mp_rerank._recipe import Recipe
from mp_rerank._workers import template_child
from mp_rerank._workers.child import Launch
from mp_rerank._workers.forkserver import DYING_SECONDS, wait_unless_unwanted
from mp_rerank._workers.forkserver import Popen as ForkedPopen
from mp_rerank._workers.green import let_files_close
from mp_rerank._workers.launching import MainlessProcess, TemplateDiedError
from mp_rerank._workers.logs import POOL_LOGGER, WORKER_LOGGER, QueuedLogger, repeat_log
from mp_rerank._workers.surroundings import block_sigpipe, standard_descriptors

__all__ = ["Templates"]

logger = QueuedLogger(POOL_LOGGER)

# A template that dies is made anew at once, so that it is there when a worker is asked of it; but only so often until
# one is: whatever ends it may go on to do so.
UNASKED_RUNS = 3


class Templates:
    """The templates of one model, made as workers are asked of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._templates: dict[tuple[int, ...], Template] = {}
        self._closed = False

    def popen(self, launch: Launch) -> Callable[[Any], Any]:
        """What forks the process of the worker ``launch``; raises ``RuntimeError`` once they are closed."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the model's workers are told to leave")
            template = self._templates.setdefault(launch.cpus, Template())
        return partial(_Popen, template, launch)

    def pids(self) -> list[int]:
        """The processes that there are now."""
        return [pid for template in self._all() if (pid := template.pid) is not None]

    def close(self) -> None:
        """End them; returns at once. Their workers, if there still are any, live on."""
        with self._lock:
            self._closed = True
        for template in self._all():
            template.close()

    @property
    def alive(self) -> bool:
        """Whether one that was told to end has not ended yet."""
        return any(template.alive for template in self._all())

    def join(self, timeout: float) -> None:
        """Wait until all have ended, at most ``timeout`` seconds; nothing waits then for one that has not."""
        deadline = time.monotonic() + timeout
        for template in self._all():
            template.join(max(0.0, deadline - time.monotonic()))

    def _all(self) -> list[Template]:
        return list(self._templates.values())


class Template:
    """The process that there is now, if any; a further one whenever a worker is asked for and it has ended."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._left: list[_Run] = []  # killed, and not ended yet
        self._closed = False
        self._recipe: Recipe | None = None
        self._unasked = 0

    @property
    def pid(self) -> int | None:
        run = self._run
        return None if run is None else run.running()

    def fork(self, launch: Launch, fds: list[int], unwanted: threading.Event) -> tuple[int, int]:
        """Have a process forked that inherits ``fds``; the pipes from it and to it, as from the fork server.

        Args:
            launch: the worker's, by which the model is loaded if it is not.
            unwanted: set once nobody wants the worker any more. Who then waits for the model to be loaded has it end.

        Raises:
            ModelLoadError: the model could not be loaded.
            TemplateDiedError: the template died while it loaded the model.
            RuntimeError: nobody wants the worker any more, or the template is closed.
            OSError: no process could be started.
        """
        until = time.monotonic() + DYING_SECONDS
        while True:
            run = self._running(launch)
            try:
                wait_unless_unwanted(run.settled.wait, unwanted, run.running)
            except RuntimeError:
                run.kill()
                raise
            if run.error is not None:
                if run.killed:  # by another who has waited too long
                    continue
                raise run.error
            try:
                return run.connect(fds, unwanted)
            except OSError:  # it is just dying: once it has ended, there is another
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)

    def _running(self, launch: Launch) -> _Run:
        with self._lock:
            if self._closed:
                raise RuntimeError("the template is closed")
            self._unasked = 0
            if self._run is None or self._run.ended.is_set() or self._run.killed:
                self._left = [run for run in self._all() if run.keeper.is_alive()]
                self._run = _Run(launch, self._recipe, self._on_loaded, self._on_end)
            return self._run

    def _all(self) -> list[_Run]:
        return self._left if self._run is None else [*self._left, self._run]

    def _on_loaded(self, recipe: Recipe | None) -> None:
        """All later processes are as the first one found best: their workers compute alike."""
        self._recipe = self._recipe or recipe

    def _on_end(self, run: _Run, exit_code: int | None) -> None:
        """On the thread that kept ``run``, which is ended: make it anew, if it had loaded the model."""
        with self._lock:
            if self._closed or run.error is not None or run is not self._run:
                return
            logger.warning(
                "a template died (exit code %s): the workers that it has forked go on "
                "[mp-rerank explain template-died]",
                exit_code,
            )
            if self._unasked < UNASKED_RUNS:
                self._unasked += 1
                with suppress(RuntimeError):  # no thread to be had: the next worker asks again
                    self._run = _Run(run.launch, self._recipe, self._on_loaded, self._on_end)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self.kill()

    def kill(self) -> None:
        """End the process that there is now."""
        run = self._run
        if run is not None:
            run.kill()

    @property
    def alive(self) -> bool:
        return any(run.keeper.is_alive() for run in self._all())

    def join(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        for run in self._all():
            run.keeper.join(max(0.0, deadline - time.monotonic()))
            if run.keeper.is_alive():
                run.abandon()


class _Run:
    """One process: it loads the model, says so or what is wrong, forks workers, and ends.

    Args:
        launch: the first worker's, as which it loads the model; but with one thread.
        recipe: how to make the model fast; ``None``: find it.
        on_loaded: told the recipe, once.
        on_end: told the exit code of a process that has ended.

    Attributes:
        settled: set once workers can be forked, or ``error`` says why not.
        error: what loading ended in.
        ended: set once the process has ended.
        killed: whether it was told to end.
    """

    def __init__(
        self,
        launch: Launch,
        recipe: Recipe | None,
        on_loaded: Callable[[Recipe | None], None],
        on_end: Callable[[_Run, int | None], None],
    ) -> None:
        number = launch.name.partition(".")[0]
        self.launch = replace(launch, name=f"{number}.template", threads=1)
        self.settled = threading.Event()
        self.ended = threading.Event()
        self.error: BaseException | None = None
        self.pid: int | None = None
        self._recipe = recipe
        self._on_loaded = on_loaded
        self._on_end = on_end
        self.killed = False
        self._reaping = threading.Lock()  # so that nobody kills a stranger that was given the same pid
        self._process: MainlessProcess | None = None
        self._address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        self._alive: Connection | None = None  # its end is a sign to the process that nobody needs it
        self.keeper = threading.Thread(target=self._keep, name="mp_rerank-template", daemon=True)
        self.keeper.start()

    def running(self) -> int | None:
        """The process, while there is one."""
        return None if self.ended.is_set() else self.pid

    def connect(self, fds: list[int], unwanted: threading.Event) -> tuple[int, int]:
        """Ask for a process as one asks multiprocessing's fork server; ``OSError`` where the template has ended."""
        with _Asking(socket.AF_UNIX) as client:
            client.unwanted, client.pid = unwanted, self.running
            client.connect(self._address)
            alive = self._alive
            if alive is None:
                raise ConnectionError("the template has ended")
            tracker: Any = resource_tracker.getfd()
            codes, its_codes = os.pipe()
            its_words, words = os.pipe()
            try:
                reduction.sendfds(client, [its_words, its_codes, alive.fileno(), tracker, *fds])
            except BaseException:
                os.close(codes)
                os.close(words)
                raise
            finally:
                os.close(its_words)
                os.close(its_codes)
        return codes, words

    def kill(self) -> None:
        self.killed = True
        with self._reaping:
            if self._process is not None:
                self._process.kill()

    def abandon(self) -> None:
        """It was killed and does not end: nothing of this process is to wait for it."""
        multiprocessing.process._children.discard(self._process)  # type: ignore[attr-defined]

    # The keeper.

    def _keep(self) -> None:
        """Start the process, and stay with it: the system kills it when this thread ends."""
        block_sigpipe()
        exit_code = None
        try:
            exit_code = self._start_and_watch()
        except BaseException as error:
            self.error = error
        finally:
            self.ended.set()
            self.settled.set()
            self._on_end(self, exit_code)

    def _start_and_watch(self) -> int | None:
        exit_code = self._live()
        if exit_code == template_child.EXIT_FETCHED and not self.killed:
            # Fetching from the hub has left threads behind; a process that finds the model in the cache has none.
            self.launch = replace(self.launch, offline=True)
            exit_code = self._live()
        return exit_code

    def _live(self) -> int | None:
        try:
            with standard_descriptors, socket.socket(socket.AF_UNIX) as listener:
                listener.bind(self._address)
                os.chmod(self._address, 0o600)
                listener.listen(128)
                alive_reader, self._alive = context.SpawnContext().Pipe(duplex=False)
                words, its_words = context.SpawnContext().Pipe(duplex=False)
                logs, its_logs = context.SpawnContext().Pipe(duplex=False)
                level = logging.getLogger(WORKER_LOGGER).getEffectiveLevel()
                arguments = (self.launch, self._recipe, listener, alive_reader, its_words, its_logs, level)
                try:
                    process = MainlessProcess(target=template_child.serve, args=arguments, name=self.launch.name)
                    process.start()
                finally:
                    for end in (alive_reader, its_words, its_logs):
                        end.close()
            self._process, self.pid = process, process.pid
            if self.killed:
                self.kill()
            try:
                began = self._watch(process, words, logs)
            finally:
                process.kill()
                with self._reaping:
                    self._process = None
                    process.join()
            if not self.settled.is_set() and process.exitcode != template_child.EXIT_FETCHED:
                self.error = TemplateDiedError(process.exitcode, began=began)
            return process.exitcode
        finally:
            alive, self._alive = self._alive, None
            if alive is not None:
                alive.close()
            with suppress(OSError):
                os.unlink(self._address)
            let_files_close()

    def _watch(self, process: MainlessProcess, words: Connection, logs: Connection) -> bool:
        """Hear what the process says until it has ended; whether it came to say anything."""
        began = False
        end = os.pidfd_open(process.pid)  # type: ignore[arg-type]
        open_ = [words, logs]
        try:
            while True:
                ready = wait([*open_, end])
                if words in ready:
                    try:
                        word = words.recv()
                    except (EOFError, OSError):
                        open_.remove(words)
                    else:
                        began = True
                        self._hear(word)
                elif logs in ready:
                    if not repeat_log(logs, self.launch.name):
                        open_.remove(logs)
                elif end in ready:
                    break
        finally:
            os.close(end)
            words.close()
            logs.close()
        return began

    def _hear(self, word: object) -> None:
        if isinstance(word, template_child.Ready):
            self._on_loaded(word.recipe)
            self.settled.set()
        elif isinstance(word, BaseException):
            self.error = word
            self.settled.set()


class _Asking(socket.socket):
    """A socket whose waits for an answer can be given up: from Python 3.14 on, sending descriptors waits for one."""

    unwanted: threading.Event
    pid: Callable[[], int | None]

    def recv(self, *args: Any) -> bytes:
        wait_unless_unwanted(partial(wait, [self.fileno()]), self.unwanted, self.pid)
        return super().recv(*args)


class _Popen(ForkedPopen):
    """A worker process forked by a template."""

    forker = "template"

    def __init__(self, template: Template, launch: Launch, process: Any) -> None:
        self._template = template
        self._launch_of_worker = launch
        super().__init__(process)

    def _launch(self, process: Any) -> None:
        try:
            super()._launch(process)
        except RuntimeError:
            if process.unwanted.is_set():  # for its start_timeout, it may be: somebody has stopped the template
                self._template.kill()
            raise

    def _connect(self, process: Any) -> tuple[int, int]:
        return self._template.fork(self._launch_of_worker, self._fds, process.unwanted)

    def _forked_by(self) -> int | None:
        return self._template.pid
