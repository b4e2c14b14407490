"""Waiting for another thread: an interrupt (Ctrl-C) ends the wait soon, and leaves nothing locked.

Ctrl-C raises in the main thread, after any call and at the start of any function. A ``Future`` takes its lock with code
written in Python, and an interrupt between taking it and noting so leaves it taken: whoever is to resolve the future
then waits for ever, and here that is the dispatcher, with everybody's requests.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

__all__ = ["SIGNAL_CHECK_SECONDS", "Answer", "PoolFuture"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# How long a caller's thread sleeps at a time: CPython can lose a signal that arrives as the main thread falls asleep on
# a lock (measured: 5 of 8 times while another thread started a process), and Ctrl-C would wait for the answer.
SIGNAL_CHECK_SECONDS = 0.5


class Answer(Generic[_T]):
    """What one thread gives, once, and any number of others wait for.

    Attributes:
        given: whether it is there: a value or an error.
        error: the error, if it is one.
    """

    def __init__(self) -> None:
        self.given = False
        self.error: BaseException | None = None
        self._value: _T
        self._gate = threading.Lock()
        self._gate.acquire()

    def give(self, value: _T) -> None:
        """Let those who wait have ``value``."""
        self._value = value
        self._open()

    def fail(self, error: BaseException) -> None:
        """Let those who wait have ``error``."""
        self.error = error
        self._open()

    def get(self) -> _T:
        """Wait; then the value, or the error raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self._value

    def wait(self, timeout: float | None = None) -> None:
        """Wait until it is given, ``timeout`` seconds at most."""
        limit = math.inf if timeout is None else time.monotonic() + timeout
        while not self.given and (left := limit - time.monotonic()) > 0:
            # Whoever is interrupted between these two shuts the gate again; the others then look by the clock.
            if self._gate.acquire(timeout=min(left, SIGNAL_CHECK_SECONDS)):
                self._gate.release()

    def _open(self) -> None:
        self.given = True
        self._gate.release()


class PoolFuture(Future[Any]):
    """A future whose done-callbacks run on threads of their own, and which Ctrl-C may interrupt.

    A ``Future`` runs its callbacks on the thread that resolves it: here the dispatcher, which one that sleeps, raises
    or closes the pool would stop for everybody. An interrupted ``result()`` could as well: see the top of this module.
    """

    def __init__(self) -> None:
        super().__init__()
        self._settled = settled = Answer[None]()
        super().add_done_callback(lambda _: settled.give(None))

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future`` has it."""
        self._settled.wait(timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future`` has it."""
        self._settled.wait(timeout)
        return super().exception(0)

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(self)`` once this future is done; at once, and here, if it is already."""
        if self.done():
            super().add_done_callback(fn)
        else:
            super().add_done_callback(lambda future: _call_apart(fn, future))

    def add_internal_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As ``Future`` has it: called on the resolving thread. For what is known to be quick."""
        super().add_done_callback(fn)


def _call_apart(fn: Callable[[Any], object], future: Any) -> None:
    def call() -> None:
        try:
            fn(future)
        except BaseException:  # SystemExit too: this thread is nobody else's
            logger.exception("a done-callback raised")

    try:
        threading.Thread(target=call, name="mp_rerank-callback", daemon=True).start()
    except RuntimeError:  # the system has no thread left, or the interpreter is leaving
        call()
