"""The one thread that owns everything that changes: the bound, requests, queues, slots.

    agent       pool.submit: validate, inbox.put(Submit), wait for a place if need be    -> Future
    dispatcher  admission.enter -> deployment.submit -> queue.add
                deployment.dispatch: queue.take -> slot.send                             one executor.submit
    worker      child.score(pairs)                                                       -> scores as float32 bytes
    executor    done-callback: inbox.put(Reported(deployment, SliceEnded(slot, generation, ...)))
    dispatcher  deployment.handle -> outcomes.scored: fill in the scores, resolve what is complete; dispatch again

Every other thread only puts messages into the inbox, so nothing here needs a lock. In particular the executors'
done-callbacks do no more: submitting from one deadlocks in a broken executor (Python 3.12, 3.13). The inbox is a
``SimpleQueue`` because a finalizer or a signal handler may put into it at any point of any thread.

The dispatcher waits for its inbox and for nothing else: the machine is looked at on a thread of its own (``nvidia-smi``
may take seconds), and log handlers run on another. There are no timers: the loop wakes for a message, or when the next
thing is due by its deployments.
"""

from __future__ import annotations

import atexit
import copy
import dataclasses
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from mp_rerank._planning.plan import Plan, Seat, make_plan
from mp_rerank._scheduling.admission import Admission
from mp_rerank._scheduling.callers import CallerCounts
from mp_rerank._scheduling.deployment import Deployment
from mp_rerank._scheduling.futures import Answer, is_pool_thread
from mp_rerank._scheduling.outcomes import Outcome
from mp_rerank._scheduling.request import Request, misfit
from mp_rerank._workers.child import WorkerFacts
from mp_rerank._workers.dask import Cluster
from mp_rerank._workers.green import make_queue
from mp_rerank._workers.handle import starting_workers
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank._workers.slot import Report
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import PoolClosedError, RequestTimeoutError, RerankError
from mp_rerank.results import PoolStats, WorkerInfo

__all__ = ["Dispatcher", "leave_with_interpreter"]

logger = QueuedLogger(POOL_LOGGER)

# The longest the loop sleeps at a time: the system's clocks take no timeout of a thousand years.
MAX_WAIT_SECONDS = 3600.0
THREAD_START_SECONDS = 5.0
# With more messages in the inbox than so many, callers wait to be admitted.
MAX_UNSEEN = 100


@dataclass(frozen=True)
class _Planned:
    outcome: Plan | BaseException


@dataclass(frozen=True)
class _Seats:
    """The seats that a cluster has now; and why there will be no others, if so."""

    seats: tuple[Seat, ...]
    lost: RerankError | None


@dataclass
class _Submit:
    request: Request


@dataclass
class _Cancel:
    request: Request


@dataclass
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


_Message = _Planned | _Seats | _Submit | _Cancel | _Reported | _Ask | _Reload | _Close


class Dispatcher:
    """The loop and its thread.

    Args:
        spec, config: for the first deployment; a reload makes another deployment on the same seats.

    Attributes:
        plan: the seats, once they are known.
        started: given once every worker is ready; the error if one cannot be.
        facts: what the workers of the present model say of it, once ``started`` is given.
        ended: given once the loop has ended, and with it the workers.
    """

    def __init__(self, spec: ModelSpec, config: PoolConfig) -> None:
        self.config = config
        self.plan: Plan | None = None
        self.started: Answer[None] = Answer()
        self.facts: WorkerFacts | None = None
        self.ended: Answer[None] = Answer()
        self._spec = spec
        self._admission = Admission(
            config.max_pending_pairs, config.max_pending_tokens, config.overload, config.max_pending_pairs_per_caller
        )
        self._inbox: queue.SimpleQueue[_Message] = make_queue()
        self._cluster: Cluster | None = None
        self._cluster_seats: tuple[Seat, ...] = ()
        self._counts = PoolStats()
        self._callers = CallerCounts()
        self._pending = 0
        self._deployment: Deployment | None = None
        self._retiring: list[Deployment] = []  # reloaded away, finishing what they had begun
        self._dismissed: list[Deployment] = []  # let go, their workers perhaps not ended yet
        self._incoming: tuple[Deployment, Answer[None]] | None = None  # being loaded by a reload
        self._closing: _Close | None = None
        self._finished = False
        self._begun = False  # whether a thread has been started
        self._running = threading.Lock()  # taken, and never given back, by the thread that runs the loop
        self._left: Answer[None] = Answer()  # given by that thread as the last thing it does
        self._owner = os.getpid()

    def __repr__(self) -> str:
        return f"{self._deployment or 'planning'}; {self._admission}"

    # What other threads call.

    @property
    def broken(self) -> bool:
        """Whether it scores nothing any more: it is closing or has ended, or no seat is left."""
        deployment = self._deployment
        return (
            self._closing is not None or self._finished or (deployment is not None and deployment.failure is not None)
        )

    def begin(self) -> None:
        """Start the thread, which starts the workers; does nothing once it runs. Never waits for another caller.

        A signal handler may come here while the thread that it interrupts is here too: then two threads are started,
        and the second to run ends at once.
        """
        if not self._running.locked():
            self._begun = True
            try:
                threading.Thread(target=self._run, name="mp_rerank-dispatcher", daemon=True).start()
            except RuntimeError:  # no thread to be had
                self._begun = self._running.locked()
                raise

    def submit(self, request: Request, *, wait: bool) -> None:
        """Queue ``request`` once there is room for it.

        Args:
            wait: whether to wait for room. Otherwise, and on a thread of a pool, the future tells whatever there is
                to tell.

        Raises:
            PoolOverloadedError, RequestTimeoutError: there was no room in time.
            PoolClosedError: the pool is closed, or was meanwhile.
        """
        if self._closing is not None or self._finished:
            raise PoolClosedError("the pool is closed")
        request.future.add_internal_callback(partial(self._on_future_done, request))
        sure = self._inbox.qsize() < MAX_UNSEEN and self._admission.is_far_from_bound(request, MAX_UNSEEN)
        self._put(_Submit(request))
        if wait and not sure and not is_pool_thread():
            request.admitted.get()

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to ``question``, asked on the dispatcher's thread, or on this one where it may not wait for that.

        A fork has no threads but the one that forked; and a thread of a pool never waits for one.
        """
        if os.getpid() != self._owner or is_pool_thread():
            return question()
        answer: Answer[Any] = Answer()
        self._put(_Ask(question, answer))
        return answer.get()

    def stats(self) -> PoolStats:
        """A copy of the counters."""

        def snapshot() -> PoolStats:
            return dataclasses.replace(
                self._counts,
                pending_requests=self._pending,
                pending_pairs=self._admission.pairs,
                exits=dict(self._counts.exits),
                slice_sizes=dict(self._counts.slice_sizes),
                callers=self._callers.snapshot(),
            )

        stats: PoolStats = self.ask(snapshot)
        return stats

    def workers(self) -> list[WorkerInfo]:
        """Each seat of the present model's deployment; none before the seats are planned."""
        workers: list[WorkerInfo] = self.ask(lambda: [] if self._deployment is None else self._deployment.workers())
        return workers

    def template_pids(self) -> list[int]:
        """The processes that the present model's workers are forked from, if they are."""
        pids: list[int] = self.ask(lambda: [] if self._deployment is None else self._deployment.template_pids())
        return pids

    def reload(self, spec: ModelSpec) -> Answer[None]:
        """Replace the model; the answer is there once new requests go to it, an error if it could not be loaded."""
        done: Answer[None] = Answer()
        self._put(_Reload(spec, done))
        return done

    def close(self, *, drain: bool) -> None:
        """End the loop: after what is pending, or at once. Returns at once; ``join`` waits."""
        self._put(_Close(drain))

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread; whether it has ended. On a thread of a pool, or in a fork, it does not wait.

        Not by ``Thread.join``: interrupted by Ctrl-C that takes the thread for ended from then on (Python 3.10 to 3.12,
        python/cpython#90882), and the interpreter would leave in the middle of the clearing up.
        """
        if not self._begun or os.getpid() != self._owner or is_pool_thread():
            return True
        limit = math.inf if timeout is None else time.monotonic() + timeout
        if not self._running.locked():  # not yet; or never, if Ctrl-C came as the thread was being started
            self._left.wait(min(limit - time.monotonic(), THREAD_START_SECONDS))
            if not self._running.locked():
                return time.monotonic() < limit
        self._left.wait(limit - time.monotonic())
        return self._left.given

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
        if not self._running.acquire(blocking=False):
            return  # another thread was first
        try:
            self._serve()
        finally:
            self._left.give(None)

    def _serve(self) -> None:
        error = PoolClosedError("the pool was closed")
        try:
            with starting_workers(self.config, self._spec) as self._cluster:
                try:
                    threading.Thread(target=self._make_plan, name="mp_rerank-plan", daemon=True).start()
                    while self._step():
                        pass
                except BaseException as bug:
                    logger.exception("the dispatcher failed [mp-rerank explain dispatcher-failed]")
                    error = PoolClosedError(f"the pool's dispatcher failed: {bug!r}")
                finally:
                    self._end(error)
        except BaseException as bug:  # what workers have in common could not be made, or ended
            logger.exception("the dispatcher failed [mp-rerank explain dispatcher-failed]")
            self._finish(PoolClosedError(f"the pool's dispatcher failed: {bug!r}"))

    def _make_plan(self) -> None:
        try:
            plan = make_plan(self.config, self._spec)
            if self._cluster is not None:
                seats = self._cluster.first_seats()
                reason = f"{len(seats)} workers: in {self._cluster}, and all that join it"
                plan = dataclasses.replace(plan, seats=plan.seats + seats, reasons=(*plan.reasons, reason))
            self._put(_Planned(plan))
        except BaseException as error:
            self._put(_Planned(error))

    def _step(self) -> bool:
        """Wait for something to do, do all of it; whether to go on."""
        self._receive()
        now = time.monotonic()
        for deployment in (*self._deployments(), *self._dismissed):
            deployment.tick(now)
        self._admit(now)
        self._change_deployments(now)
        for deployment in self._deployments():
            deployment.dispatch(now)
        if self._closing is None:
            return True
        return self._closing.drain and not all(deployment.drained for deployment in self._deployments())

    def _receive(self) -> None:
        """Handle the next message, waiting for it until something is due, and all that are there behind it."""
        try:
            wait = max(0.0, self._wake_at() - time.monotonic())
            self._handle(self._inbox.get(timeout=min(MAX_WAIT_SECONDS, wait)))
            # Not until it is empty: callers who never pause would keep the workers waiting.
            for _ in range(self._inbox.qsize()):
                self._handle(self._inbox.get_nowait())
        except queue.Empty:
            pass

    def _wake_at(self) -> float:
        times = [deployment.wake_at() for deployment in (*self._deployments(), *self._dismissed)]
        return min((t for t in (*times, self._admission.next_expiry()) if t is not None), default=math.inf)

    def _handle(self, message: _Message) -> None:
        if isinstance(message, _Reported):
            message.deployment.handle(message.report, time.monotonic())
        elif isinstance(message, _Submit):
            self._enter(message.request)
        elif isinstance(message, _Cancel):
            if self._admission.give_up(message.request):
                message.request.cancel()
            else:
                any(deployment.cancel(message.request) for deployment in self._deployments())
        elif isinstance(message, _Ask):
            _answer(message)
        elif isinstance(message, _Planned):
            self._begin_deployment(message.outcome)
        elif isinstance(message, _Seats):
            self._seat(message)
        elif isinstance(message, _Reload):
            self._begin_reload(message)
        else:
            # A second close may turn draining into not draining; not the other way round.
            if self._closing is None or self._closing.drain:
                self._closing = message
            self._turn_away_line()

    # Requests on their way in.

    def _enter(self, request: Request) -> None:
        """Admit ``request``, or let it stand in line."""
        if self._closing is not None:
            _refuse(request, PoolClosedError("the pool is closed"))
        elif self._admission.enter(request, time.monotonic()):
            self._admitted(request)

    def _admit(self, now: float) -> None:
        """Let requests in from the line, and refuse those that have waited long enough."""
        for request in self._admission.let_in():
            self._admitted(request)
        for request in self._admission.expire(now):
            if request.deadline is None or request.deadline > now:
                _refuse(request, self._admission.refusal(request))
            elif request.partial:
                request.resolve()  # with what there is: nothing
                request.admitted.give(None)
            else:
                words = f"the request waited {request.timeout:g} s to be admitted"
                _refuse(request, RequestTimeoutError(words, timeout=request.timeout or 0.0, total=len(request.pairs)))
        for request in self._admission.let_in():  # who stood behind one that was refused may be smaller
            self._admitted(request)

    def _admitted(self, request: Request) -> None:
        assert self._deployment is not None  # nobody submits before it is ready
        self._counts.submitted += 1
        self._callers.admitted(request)
        self._pending += 1
        request.admitted.give(None)
        why = None if self.facts is None else misfit(self.facts, request.options, ranking=request.ranking)
        if why is not None:
            request.fail(ValueError(f"{self._deployment.spec.name}, the model since a moment ago, {why}"))
            self._on_done(request, "failed")
        else:
            self._deployment.submit(request)

    def _on_done(self, request: Request, outcome: Outcome) -> None:
        self._pending -= 1
        self._admission.leave(request)
        self._callers.done(request, outcome)
        setattr(self._counts, outcome, getattr(self._counts, outcome) + 1)

    # Deployments.

    def _begin_deployment(self, plan: Plan | BaseException) -> None:
        if self._closing is not None:
            return
        if isinstance(plan, BaseException):
            self.started.fail(plan)
            return
        self.plan = plan
        self.config = dataclasses.replace(self.config, batch_tokens=plan.batch_tokens)
        self._cluster_seats = tuple(seat for seat in plan.seats if seat.place is not None)
        self._deployment = self._make_deployment(self._spec)
        self._deployment.start(time.monotonic())
        if self._cluster is not None:
            self._cluster.watch(lambda seats, lost: self._put(_Seats(seats, lost)))

    def _seat(self, message: _Seats) -> None:
        self._cluster_seats = message.seats
        for deployment in self._deployments():
            deployment.seat(message.seats, message.lost, time.monotonic())

    def _begin_reload(self, message: _Reload) -> None:
        if self._closing is not None:
            message.done.fail(PoolClosedError("the pool is closed"))
        elif self._incoming is not None:
            message.done.fail(RerankError("a reload is already under way"))
        else:
            deployment = self._make_deployment(message.spec)
            self._incoming = (deployment, message.done)
            deployment.start(time.monotonic(), in_turn=True)

    def _make_deployment(self, spec: ModelSpec) -> Deployment:
        def notify(report: Report) -> None:
            self._put(_Reported(deployment, report))

        assert self.plan is not None
        seats = [seat for seat in self.plan.seats if seat.place is None]
        deployment = Deployment(spec, [*seats, *self._cluster_seats], self.config, notify, self._on_done, self._counts)
        return deployment

    def _change_deployments(self, now: float) -> None:
        """Give ``started``, switch to a reloaded model, let go of a drained one."""
        if not self.started.given and self._deployment is not None:
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
                self._incoming = None
                self._switch_to(deployment)
                done.give(None)
        self._dismissed = [deployment for deployment in self._dismissed if deployment.alive]
        for deployment in [deployment for deployment in self._retiring if deployment.drained]:
            self._retiring.remove(deployment)
            self._dismiss(deployment, now, successor=self._deployment)

    def _switch_to(self, deployment: Deployment) -> None:
        """Let new requests go to ``deployment``, which a reload has loaded.

        Whatever has begun with the old model ends with it; the rest, and all that follows, gets the new. What waits for
        scores of another shape than the new one's, or needs what only the old one can do, stays too: it was asked for
        of the old.
        """
        old, self._deployment = self._deployment, deployment
        assert old is not None
        assert deployment.facts is not None
        self._retiring.append(old)
        for request in old.queue.drop_untouched():
            same = old.facts is None or old.facts.num_labels == deployment.facts.num_labels
            fits = same and misfit(deployment.facts, request.options, ranking=request.ranking) is None
            (deployment if fits else old).submit(request)
        self.facts = deployment.facts
        self._counts.reloads += 1

    def _dismiss(self, deployment: Deployment, now: float, successor: Deployment | None = None) -> None:
        deployment.close(now, kill=False, successor=successor)
        self._dismissed.append(deployment)

    def _deployments(self) -> Iterator[Deployment]:
        if self._deployment is not None:
            yield self._deployment
        yield from self._retiring
        if self._incoming is not None:
            yield self._incoming[0]

    # The end.

    def _end(self, error: PoolClosedError) -> None:
        """Leave nothing behind: no request unanswered, no worker, no caller waiting."""
        drained = self._closing is not None and self._closing.drain
        deployments = list(self._deployments())
        try:
            self._turn_away_line()
            for deployment in deployments:
                deployment.fail_all(error)
            for deployment in deployments:
                deployment.close(time.monotonic(), kill=not drained)
            for deployment in (*deployments, *self._dismissed):
                deployment.join()
            self._retiring.clear()
            self._dismissed.clear()
        finally:
            self._finish(error)

    def _finish(self, error: PoolClosedError) -> None:
        """Answer everybody who waits for the pool, now and from here on."""
        if not self.started.given:
            self.started.fail(error)
        if self._incoming is not None:
            self._incoming[1].fail(error)
        self._finished = True
        self._turn_away()
        self.ended.give(None)

    def _turn_away_line(self) -> None:
        for request in self._admission.clear():
            _refuse(request, PoolClosedError("the pool was closed while this request waited to be admitted"))

    def _turn_away(self) -> None:
        """Answer what reached the inbox after the loop ended; any thread may."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, _Submit):
                _refuse(message.request, PoolClosedError("the pool is closed"))
            elif isinstance(message, _Ask):
                _answer(message)
            elif isinstance(message, _Reload):
                message.done.fail(PoolClosedError("the pool is closed"))


def _refuse(request: Request, error: RerankError) -> None:
    """Give ``error`` to whoever waits for ``request`` to be admitted, and to its future."""
    request.fail(copy.copy(error))
    request.admitted.fail(error)


def _answer(message: _Ask) -> None:
    try:
        message.answer.give(message.question())
    except BaseException as error:
        message.answer.fail(error)


# Every dispatcher of this process that may still be running.
_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def leave_with_interpreter(dispatcher: Dispatcher) -> None:
    """Close ``dispatcher`` when the interpreter exits, or refuse if it is exiting already."""
    global _registered
    if not _registered:
        try:
            # Before concurrent.futures' own hook, which would wait for running slices: hooks run last in, first out,
            # and this is the only place that comes before it. atexit is too late: its threads have been joined by then.
            getattr(threading, "_register_atexit", atexit.register)(_close_all)
        except RuntimeError as error:
            raise PoolClosedError(f"the interpreter is exiting: {error}") from None
        _registered = True
    _dispatchers.add(dispatcher)
    if _exiting:
        raise PoolClosedError("the interpreter is exiting")


_registered = False
_exiting = False


def _close_all() -> None:
    global _exiting
    _exiting = True  # so that a pool that is not in the list yet will see it
    for dispatcher in list(_dispatchers):
        dispatcher.close(drain=False)
    for dispatcher in list(_dispatchers):
        dispatcher.join(timeout=30.0)
