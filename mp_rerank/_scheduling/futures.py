"""Waiting for another thread: an interrupt or a signal handler finds nothing locked, and no thread of ours waits.

User code runs at nearly any moment of any thread: a signal handler in the main thread, a finalizer wherever garbage is
collected. It may use the pool, or end the wait with an exception (Ctrl-C). So two rules hold:

* No lock is held while user code can run. A ``Future`` takes its lock with code written in Python; interrupted there,
  it leaves the lock taken, and whoever is to resolve the future waits for ever: here the dispatcher, with everybody's
  requests. `PoolFuture` and `Answer` decide in single steps of the interpreter, and can be interrupted between them.
* No thread of ours waits for the pool: it would wait for itself. `Answer.wait` raises there instead.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another than the built-in one before Python 3.11
from concurrent.futures._base import CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED, RUNNING
from concurrent.futures.process import _ExecutorManagerThread
from typing import Any, Generic, NamedTuple, TypeVar

from mp_rerank._checks import is_for_ever

__all__ = [
    "SIGNAL_CHECK_SECONDS",
    "Answer",
    "PoolFuture",
    "RequestTimes",
    "check_may_wait",
    "is_pool_thread",
    "result_of",
]

_T = TypeVar("_T")

logger = logging.getLogger("mp_rerank.pool")

# How long a caller's thread sleeps at a time: CPython can lose a signal that arrives as the main thread falls asleep on
# a lock (measured: 5 of 8 times while another thread started a process), and Ctrl-C would wait for the answer.
SIGNAL_CHECK_SECONDS = 0.5

# Of threads that pools depend on: their own, and those of their workers, which are named for slot and generation.
OURS = re.compile(r"mp_rerank-(client|dispatcher|models|plan|server|log|cluster|\d+\.\d+)\b")
CALLBACK_THREAD = "mp_rerank-callback"


def is_pool_thread() -> bool:
    """Whether this thread is one that pools depend on: the dispatcher's, a worker's, or an executor's.

    User code gets there all the same: a finalizer, a log handler, a model on a thread.
    """
    thread = threading.current_thread()
    return (
        bool(OURS.match(thread.name))
        or thread.name == "QueueFeederThread"
        or isinstance(thread, _ExecutorManagerThread)
    )


def check_may_wait() -> None:
    """Raise ``RuntimeError`` on a thread that pools depend on."""
    if is_pool_thread():
        raise RuntimeError(
            f"the thread {threading.current_thread().name} belongs to a RerankerPool, and would wait for itself: do "
            "not wait for the pool in a finalizer, in a log handler, or in a model"
        )


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
        self._callbacks: deque[Callable[[], object]] = deque()

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
        """Wait until it is given, ``timeout`` seconds at most.

        Raises:
            RuntimeError: this is a thread of a pool, which would wait for itself.
        """
        if not self.given:
            check_may_wait()
        limit = math.inf if timeout is None or is_for_ever(timeout) else time.monotonic() + timeout
        while not self.given and (left := limit - time.monotonic()) > 0:
            # Whoever is interrupted between these two shuts the gate again; the others then look by the clock.
            if self._gate.acquire(timeout=min(left, SIGNAL_CHECK_SECONDS)):
                self._open_gate()

    def on_given(self, fn: Callable[[], object]) -> None:
        """Call ``fn`` once, on the thread that gives, or here if it is given already. For what is known to be quick."""
        self._callbacks.append(fn)
        if self.given:
            self._call()

    def _open(self) -> None:
        self.given = True
        self._open_gate()
        self._call()

    def _open_gate(self) -> None:
        try:
            self._gate.release()
        except RuntimeError:  # it is open: another thread was interrupted in between, and this one does it again
            pass

    def _call(self) -> None:
        # Each pop is one step: of two threads here, each callback is called by one.
        while self._callbacks:
            try:
                fn = self._callbacks.popleft()
            except IndexError:
                return
            fn()


class RequestTimes(NamedTuple):
    """How long a request took, in seconds.

    Attributes:
        waited: from its submission until a worker began with it: for room, for its turn, for a worker.
        scored: from then until its last score was there. What several workers did at once counts once.
        tokenized: what workers took, in that time, to make tokens of the slices that it had a part in, summed; ``None``
            where they do not tell.
    """

    waited: float
    scored: float
    tokenized: float | None = None


class PoolFuture(Future[Any]):
    """A future whose done-callbacks run on threads of their own, and which can be interrupted at any moment.

    A ``Future`` runs its callbacks on the thread that resolves it: here the dispatcher, which one that sleeps, raises
    or closes the pool would stop for everybody.

    Either its owner cancels it or the pool resolves it: whoever is first to decide. The methods of ``Future`` that take
    its lock while it may still be resolved are replaced; ``wait`` and ``as_completed`` of the standard library, which
    take it too, keep their weakness.

    Attributes:
        times: how long the request took, once it is done; ``None`` where no worker scored the whole of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.times: RequestTimes | None = None
        self._settled = Answer[None]()

    def claim(self) -> bool:
        """For the pool: whether it is to resolve this future, which nobody can cancel any more."""
        if self._decide("resolved"):
            return True
        self._settle_cancelled()  # again: whoever cancelled it may have been interrupted
        return False

    def cancel(self) -> bool:
        """As ``Future`` has it; works until the future is done."""
        if self._decide("cancelled"):
            told = self._settled.given
            self._settle_cancelled()
            if not told:
                with self._condition:
                    for waiter in self._waiters:  # whoever waits by ``wait`` or ``as_completed``
                        waiter.add_cancelled(self)
        return self.cancelled()

    def _decide(self, fate: str) -> bool:
        """Whether ``fate`` is the future's: the first to be named, in one step of the interpreter."""
        decided: str = vars(self).setdefault("_fate", fate)
        return decided == fate

    def _settle_cancelled(self) -> None:
        self._state = CANCELLED_AND_NOTIFIED
        self._settled.give(None)

    def cancelled(self) -> bool:
        """As ``Future`` has it."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED)

    def running(self) -> bool:
        """As ``Future`` has it."""
        return self._state == RUNNING

    def done(self) -> bool:
        """As ``Future`` has it."""
        return self._state in (CANCELLED, CANCELLED_AND_NOTIFIED, FINISHED)

    def result(self, timeout: float | None = None) -> Any:
        """As ``Future`` has it. On a thread of a pool it raises ``RuntimeError`` rather than wait."""
        error = self.exception(timeout)
        if error is not None:
            try:
                raise error
            finally:
                del self, error  # a traceback would keep both, and each other
        return self._result

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As ``Future`` has it. On a thread of a pool it raises ``RuntimeError`` rather than wait."""
        self._settled.wait(timeout)
        if self.cancelled():
            raise CancelledError
        if not self.done():
            raise FutureTimeoutError
        return self._exception

    def add_done_callback(self, fn: Callable[[Any], object]) -> None:
        """Call ``fn(self)`` once this future is done; at once, and here, if it is already."""
        if self._settled.given:
            try:
                fn(self)
            except Exception:
                logger.exception("a done-callback raised [mp-rerank explain callback-raised]")
        else:
            self._settled.on_given(lambda: _call_apart(fn, self))

    def add_internal_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """As ``Future`` has it: called on the resolving thread. For what is known to be quick."""
        self._settled.on_given(lambda: fn(self))

    def _invoke_callbacks(self) -> None:
        # Called by ``Future`` once it is done, after it has let go of its lock.
        self._settled.give(None)


async def result_of(future: Future[Any]) -> Any:
    """The result of a `PoolFuture`, waited for on no thread. Cancelled, cancel it.

    ``asyncio.wrap_future`` has a done-callback, and so a thread for each.
    """
    if not isinstance(future, PoolFuture):
        return await asyncio.wrap_future(future)
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not settled.done():
            settled.set_result(None)

    def tell(_: object) -> None:
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:  # the loop has been closed meanwhile
            pass

    future.add_internal_callback(tell)
    try:
        await settled
    finally:
        future.cancel()  # of a finished one: nothing
    if future.cancelled():
        raise asyncio.CancelledError
    return future.result()


def _call_apart(fn: Callable[[Any], object], future: Any) -> None:
    try:
        threading.Thread(target=_call_guarded, args=(fn, future), name=CALLBACK_THREAD, daemon=True).start()
    except RuntimeError:  # the system has no thread left, or the interpreter is leaving
        _call_guarded(fn, future)


def _call_guarded(fn: Callable[[Any], object], future: Any) -> None:
    try:
        fn(future)
    except BaseException:  # SystemExit too: this thread is nobody else's
        logger.exception("a done-callback raised [mp-rerank explain callback-raised]")
