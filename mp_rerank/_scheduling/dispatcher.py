"""The one thread that owns everything that changes: requests, queues, slots.

    agent       pool.submit: validate, admit, inbox.put(Submit)                          -> Future
    dispatcher  deployment.submit -> queue.add;  deployment.dispatch: queue.take -> slot.send        one executor.submit
    worker      worker.score(pairs)                                                      -> scores as float32 bytes
    executor    done-callback: inbox.put(Reported(deployment, SliceEnded(slot, generation, ...)))
    dispatcher  deployment.handle: fill in the scores, resolve what is complete, dispatch again

Every other thread only puts messages into the inbox, so nothing here needs a lock. In particular the executors'
done-callbacks do no more: submitting from one deadlocks in a broken executor (Python 3.12, 3.13). The inbox is a
``SimpleQueue`` because a finalizer may put into it at any point of any thread.

There are no timers: the loop wakes for a message, or when the next thing is due by its deployments.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from mp_rerank._planning.plan import Seat
from mp_rerank._scheduling.admission import Admission
from mp_rerank._scheduling.deployment import Deployment, Outcome
from mp_rerank._scheduling.futures import SIGNAL_CHECK_SECONDS, Answer
from mp_rerank._scheduling.request import Request
from mp_rerank._workers.child import WorkerFacts
from mp_rerank._workers.green import make_queue
from mp_rerank._workers.handle import starting_workers
from mp_rerank._workers.logs import GuardedLogger
from mp_rerank._workers.slot import Report
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import PoolClosedError, RerankError
from mp_rerank.results import PoolStats, WorkerInfo

__all__ = ["Dispatcher"]

logger = GuardedLogger(logging.getLogger(__name__), {})

# The longest the loop sleeps at a time: the system's clocks take no timeout of a thousand years.
MAX_WAIT_SECONDS = 3600.0


@dataclass(frozen=True)
class _Submit:
    request: Request


@dataclass(frozen=True)
class _Cancel:
    request: Request


@dataclass(frozen=True)
class _Reported:
    deployment: Deployment
    report: Report


@dataclass(frozen=True)
class _Ask:
    question: Callable[[], Any]
    answer: Answer[Any]


@dataclass(frozen=True)
class _Reload:
    spec: ModelSpec
    done: Answer[None]


@dataclass(frozen=True)
class _Close:
    drain: bool


_Message = _Submit | _Cancel | _Reported | _Ask | _Reload | _Close


class Dispatcher:
    """The loop and its thread.

    Args:
        spec, seats, config: for the first deployment; a reload makes another deployment on the same seats.

    Attributes:
        started: given once every worker is ready; the error if one cannot be.
        facts: what the workers of the present model say of it, once ``started`` is given.
        admission: callers pass it before they submit; the dispatcher gives their places back.
    """

    def __init__(self, spec: ModelSpec, seats: Sequence[Seat], config: PoolConfig) -> None:
        self.config = config
        self.seats = seats
        self.admission = Admission(config.max_pending_pairs, config.max_pending_tokens, config.overload)
        self.started: Answer[None] = Answer()
        self.facts: WorkerFacts | None = None
        self._inbox: queue.SimpleQueue[_Message] = make_queue()
        self._counts = PoolStats()
        self._pending = 0
        self._deployment = self._make_deployment(spec)
        self._retiring: list[Deployment] = []  # reloaded away, finishing what they had begun
        self._dismissed: list[Deployment] = []  # let go, their workers perhaps not ended yet
        self._incoming: tuple[Deployment, Answer[None]] | None = None  # being loaded by a reload
        self._closing: _Close | None = None
        self._finished = False
        self._thread = threading.Thread(target=self._run, name="mp_rerank-dispatcher", daemon=True)
        self._owner = os.getpid()

    def __repr__(self) -> str:
        return repr(self._deployment)

    # What other threads call.

    def start(self) -> None:
        """Start the thread, which starts the workers."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue ``request``, which has been admitted."""
        request.future.add_internal_callback(partial(self._on_future_done, request))
        self._put(_Submit(request))

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to ``question``, asked on the dispatcher's thread, or on this one where that does not run."""
        if os.getpid() != self._owner:  # a fork has no threads but the one that forked
            return question()
        answer: Answer[Any] = Answer()
        self._put(_Ask(question, answer))
        return answer.get()

    def stats(self) -> PoolStats:
        """A copy of the counters."""

        def snapshot() -> PoolStats:
            return dataclasses.replace(self._counts, pending_requests=self._pending, pending_pairs=self.admission.pairs)

        stats: PoolStats = self.ask(snapshot)
        return stats

    def workers(self) -> list[WorkerInfo]:
        """Each seat of the present model's deployment."""
        workers: list[WorkerInfo] = self.ask(lambda: self._deployment.workers())
        return workers

    def reload(self, spec: ModelSpec) -> Answer[None]:
        """Replace the model; the answer is there once new requests go to it, an error if it could not be loaded."""
        done: Answer[None] = Answer()
        self._put(_Reload(spec, done))
        return done

    def close(self, *, drain: bool) -> None:
        """End the loop: after what is pending, or at once. Returns at once; ``join`` waits."""
        self._put(_Close(drain))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread, unless this is it or it belongs to another process; whether it has ended."""
        if self._thread.ident is None or os.getpid() != self._owner or threading.current_thread() is self._thread:
            return True
        limit = math.inf if timeout is None else time.monotonic() + timeout
        while self._thread.is_alive() and (left := limit - time.monotonic()) > 0:
            self._thread.join(min(left, SIGNAL_CHECK_SECONDS))
        return not self._thread.is_alive()

    def _put(self, message: _Message) -> None:
        self._inbox.put(message)
        # The loop sets _finished and then empties the inbox; so either it has seen this message or we see the flag.
        if self._finished:
            self._turn_away()

    def _on_future_done(self, request: Request, future: Future[Any]) -> None:
        if future.cancelled():
            self._put(_Cancel(request))

    # The loop.

    def _run(self) -> None:
        error = PoolClosedError("the pool was closed")
        with starting_workers(self.config):
            try:
                self._deployment.start(time.monotonic())
                while self._step():
                    pass
            except BaseException as bug:
                logger.exception("the dispatcher failed")
                error = PoolClosedError(f"the pool's dispatcher failed: {bug!r}")
            finally:
                self._end(error)

    def _step(self) -> bool:
        """Wait for something to do, do all of it; whether to go on."""
        self._receive()
        now = time.monotonic()
        for deployment in (*self._deployments(), *self._dismissed):
            deployment.tick(now)
        self._change_deployments(now)
        for deployment in self._deployments():
            deployment.dispatch(now)
        if self._closing is None:
            return True
        return self._closing.drain and not all(deployment.drained for deployment in self._deployments())

    def _receive(self) -> None:
        """Handle the next message, waiting for it until something is due, and all that are there behind it."""
        deployments = (*self._deployments(), *self._dismissed)
        due = min((t for deployment in deployments if (t := deployment.wake_at()) is not None), default=math.inf)
        try:
            self._handle(self._inbox.get(timeout=min(MAX_WAIT_SECONDS, max(0.0, due - time.monotonic()))))
            # Not until it is empty: callers who never pause would keep the workers waiting.
            for _ in range(self._inbox.qsize()):
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _handle(self, message: _Message) -> None:
        if isinstance(message, _Reported):
            message.deployment.handle(message.report, time.monotonic())
        elif isinstance(message, _Submit):
            self._counts.submitted += 1
            self._pending += 1
            error = self._refusal(message.request)
            if error is not None:
                message.request.fail(error)
                self._on_done(message.request, "failed")
            else:
                self._deployment.submit(message.request)
        elif isinstance(message, _Cancel):
            any(deployment.cancel(message.request) for deployment in self._deployments())
        elif isinstance(message, _Ask):
            _answer(message)
        elif isinstance(message, _Reload):
            self._begin_reload(message)
        else:
            # A second close may turn draining into not draining; not the other way round.
            if self._closing is None or self._closing.drain:
                self._closing = message
            self.admission.close()

    def _refusal(self, request: Request) -> Exception | None:
        """Why ``request``, admitted a moment ago, cannot be taken any more."""
        if self._closing is not None:
            return PoolClosedError("the pool is closed")
        if request.ranking and self.facts is not None and self.facts.num_labels != 1:
            return ValueError(
                f"{self._deployment.spec.name}, the model since a moment ago, gives {self.facts.num_labels} scores a "
                "pair, and ranking needs one: use submit_pairs"
            )
        return None

    def _change_deployments(self, now: float) -> None:
        """Give ``started``, switch to a reloaded model, let go of a drained one."""
        if not self.started.given:
            if self._deployment.failure is not None:
                self.started.fail(self._deployment.failure)
            elif self._deployment.ready:
                self.facts = self._deployment.facts
                self.started.give(None)
        if self._incoming is not None:
            deployment, done = self._incoming
            if deployment.failure is not None:
                self._incoming = None
                self._dismiss(deployment, now)
                done.fail(deployment.failure)
            elif deployment.ready:
                # Whatever has begun with the old model ends with it; the rest, and all that follows, gets the new. What
                # waits for scores of another shape than the new one's stays too: it was asked for of the old.
                self._incoming = None
                old, self._deployment = self._deployment, deployment
                self._retiring.append(old)
                assert deployment.facts is not None
                if old.facts is None or old.facts.num_labels == deployment.facts.num_labels:
                    for request in old.queue.drop_untouched():
                        deployment.submit(request)
                self.facts = deployment.facts
                self._counts.reloads += 1
                done.give(None)
        self._dismissed = [deployment for deployment in self._dismissed if deployment.alive]
        for deployment in [deployment for deployment in self._retiring if deployment.drained]:
            self._retiring.remove(deployment)
            self._dismiss(deployment, now)

    def _begin_reload(self, message: _Reload) -> None:
        if self._closing is not None:
            message.done.fail(PoolClosedError("the pool is closed"))
        elif self._incoming is not None:
            message.done.fail(RerankError("a reload is already under way"))
        else:
            deployment = self._make_deployment(message.spec)
            self._incoming = (deployment, message.done)
            deployment.start(time.monotonic())

    def _end(self, error: PoolClosedError) -> None:
        """Leave nothing behind: no request unanswered, no worker, no caller waiting."""
        self.admission.close()
        drained = self._closing is not None and self._closing.drain
        deployments = self._deployments()
        try:
            for deployment in deployments:
                deployment.fail_all(error)
            for deployment in deployments:
                deployment.close(time.monotonic(), kill=not drained)
            for deployment in (*deployments, *self._dismissed):
                deployment.join()
            self._retiring.clear()
            self._dismissed.clear()
        finally:
            if not self.started.given:
                self.started.fail(error)
            if self._incoming is not None:
                self._incoming[1].fail(error)
            self._finished = True
            self._turn_away()

    def _turn_away(self) -> None:
        """Answer what reached the inbox after the loop ended; any thread may."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Submit):
                message.request.fail(PoolClosedError("the pool is closed"))
                self.admission.release(message.request)
            elif isinstance(message, _Ask):
                _answer(message)
            elif isinstance(message, _Reload):
                message.done.fail(PoolClosedError("the pool is closed"))

    def _deployments(self) -> list[Deployment]:
        incoming = [] if self._incoming is None else [self._incoming[0]]
        return [self._deployment, *self._retiring, *incoming]

    def _make_deployment(self, spec: ModelSpec) -> Deployment:
        def notify(report: Report) -> None:
            self._put(_Reported(deployment, report))

        deployment = Deployment(spec, self.seats, self.config, notify, self._on_done, self._counts)
        return deployment

    def _dismiss(self, deployment: Deployment, now: float) -> None:
        deployment.close(now, kill=False)
        self._dismissed.append(deployment)

    def _on_done(self, request: Request, outcome: Outcome) -> None:
        self._pending -= 1
        self.admission.release(request)
        setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)


def _answer(message: _Ask) -> None:
    try:
        message.answer.give(message.question())
    except BaseException as error:
        message.answer.fail(error)
