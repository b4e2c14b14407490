"""The slots that serve one model, and the queue before them: what is sent where, and what is done when a worker dies.

Runs on the dispatcher's thread alone. Time comes in as ``now`` (monotonic seconds); what a slot has to say comes in
through ``handle``. Every change of a slot's state is made here. What needs none of that is elsewhere: which requests
get what (``outcomes``), how much a worker is given (``portions``), how many workers there should be (``scaling``),
whether they hold the same model (``agreement``), and those that were let go (``departures``).

A death is acted on once everything about it is known: the process has ended, and each slice it had has come back,
scored or broken. The first of the broken ones was running and is the suspect; the others merely wait again.
"""

from __future__ import annotations

import copy
import signal
import time
from collections import Counter
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from concurrent.futures import BrokenExecutor

from mp_rerank._pairs import Reading, Score
from mp_rerank._planning.plan import Seat, default_batch_tokens
from mp_rerank._scheduling import scaling
from mp_rerank._scheduling.agreement import Agreement
from mp_rerank._scheduling.departures import Departures
from mp_rerank._scheduling.outcomes import Outcome, Outcomes
from mp_rerank._scheduling.portions import next_tokens
from mp_rerank._scheduling.queue import RequestQueue, Slice
from mp_rerank._scheduling.request import Request
from mp_rerank._workers.child import EXIT_DEVICE_LOST, WorkerFacts
from mp_rerank._workers.dask import SeatLeftError
from mp_rerank._workers.handle import make_templates
from mp_rerank._workers.launching import LaunchError
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank._workers.slot import Described, Exited, Loaded, NotBegunError, Report, SliceEnded, Slot, SlotState
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import (
    ClusterError,
    ModelLoadError,
    RerankError,
    WorkerCrashedError,
)
from mp_rerank.results import ExitReason, PoolStats, WorkerExit, WorkerInfo

__all__ = ["Deployment"]

logger = QueuedLogger(POOL_LOGGER)

# A slice of unequal pairs is padded to the longest: a little less than a batch fits one.
BATCHES_A_SLICE = 0.9
# Below this a slice costs more to send than to score sooner on another worker.
MIN_SLICE_TOKENS = 128
# A slice is called hung only far beyond what the worker's speed promises: speed varies with length and with neighbours.
HANG_MARGIN = 10.0
MAX_BACKOFF_SECONDS = 30.0
# The slices of a worker that has ended are given up as lost after so many seconds: they have come back by then, unless
# a fork of this process holds the worker's pipes open.
LOST_AFTER_SECONDS = 5.0
# A worker that has not ended so long after it was killed (a system call that cannot be interrupted, a frozen control
# group) is not waited for any more. Freeing the memory of a large model takes seconds.
KILL_GRACE_SECONDS = 20.0


class Deployment:
    """Workers with one model between them.

    Args:
        spec: the model; a deployment never changes it.
        seats: one slot each.
        config: the bounds.
        notify: given each report of each slot, on any thread; it must come back through ``handle``.
        on_done: told of each request that is finished, and how.
        counts: counters to count in; the dispatcher's, since a pool outlives its deployments.

    Attributes:
        failure: why no slot is left, once none is.
    """

    def __init__(
        self,
        spec: ModelSpec,
        seats: Sequence[Seat],
        config: PoolConfig,
        notify: Callable[[Report], None],
        on_done: Callable[[Request, Outcome], None],
        counts: PoolStats,
    ) -> None:
        self.spec = spec
        self.config = config
        # The scores kept are this model's, as the queue is: they end with it.
        self.queue = RequestQueue(coalesce=config.coalesce, kept=_kept_scores(config.score_cache), counts=counts)
        self._outcomes = Outcomes(spec.name, self.queue, config.nan_scores, on_done, counts)
        self.slots: list[Slot[Slice]] = []
        self.failure: RerankError | None = None
        self._agreement = Agreement(spec.name)
        self._fetched = False  # whether a worker has ever loaded the model
        self._notify = notify
        self._counts = counts
        self._dispatched_at = 0.0  # when slots were last asked for room
        self._lost: RerankError | None = None  # why no seat will join, if none will
        self._templates = make_templates(config)
        self._departures = Departures(self._templates)
        self._closed = False
        self._started = False
        self._scored = False  # whether the model has ever scored anything but its canary
        self._blamed: set[Hashable] = set()  # pairs that failed their requests since it last did
        self._seated = 0  # slots there have been
        self._in_turn = False
        for seat in seats:
            self._add_slot(seat)

    def __repr__(self) -> str:
        states = Counter(slot.state.value for slot in self.slots)
        shown = ", ".join(f"{n} {state}" for state, n in states.items())
        return f"<Deployment of {self.spec.name}: {shown}; {self.queue}>"

    @property
    def facts(self) -> WorkerFacts | None:
        """What the first worker that was ready said of the model; the others agree with it."""
        return self._agreement.facts

    @property
    def ready(self) -> bool:
        """Whether every slot that does not rest has a worker with a proved model, and one has."""
        return self.facts is not None and all(slot.state in (SlotState.READY, SlotState.RESTING) for slot in self.slots)

    @property
    def drained(self) -> bool:
        """Whether no request is left."""
        return not self.queue.live

    def start(self, now: float, *, in_turn: bool = False) -> None:
        """Launch the first workers.

        Args:
            in_turn: on one half of a cluster's seats after the other: there the model before is scored meanwhile, and
                not where another is being loaded.
        """
        self._in_turn = in_turn
        for slot in self.slots[max(1, scaling.least_workers(self.slots, self.config)) :]:
            slot.state = SlotState.RESTING
        self._launch_first(now)

    def seat(self, seats: Sequence[Seat], lost: RerankError | None, now: float) -> None:
        """Take the seats of a cluster that there are now and that have no slot yet.

        Args:
            seats: all of them.
            lost: why no more will come, while none can: then the deployment fails once it has no slot left.
        """
        self._lost = lost
        known = {slot.seat.place for slot in self.slots}
        for seat in seats:
            if seat.place not in known:
                slot = self._add_slot(seat)
                logger.info("worker %d: %s of the cluster has a seat", slot.index, seat.place)
        self._launch_first(now)
        self._check_seats()

    def _add_slot(self, seat: Seat) -> Slot[Slice]:
        slot: Slot[Slice] = Slot(self._seated, seat, self._notify)
        self._seated += 1
        self.slots.append(slot)
        return slot

    def submit(self, request: Request) -> None:
        """Take over ``request``."""
        if self.failure is not None:
            self._outcomes.fail(request, copy.copy(self.failure))
        else:
            self._outcomes.add(request)

    def cancel(self, request: Request) -> bool:
        """Drop a request whose future was cancelled; whether it was one of this deployment's."""
        return self._outcomes.cancel(request)

    def handle(self, report: Report, now: float) -> None:
        """Act on what a slot reported."""
        slot = report.slot
        self._outcomes.expire(now)  # what is scored after its deadline comes too late
        if isinstance(report, SliceEnded):
            if report.generation == slot.generation:
                self._slice_ended(slot, report, now)
        elif report.generation != slot.generation or slot.worker is None or slot.state is SlotState.CLOSED:
            return  # of a worker already let go
        elif isinstance(report, Loaded):
            self._loaded(slot, report.error, now)
        elif isinstance(report, Described):
            self._described(slot, report.outcome, now)
        else:
            self._exited(slot, report, now)

    def tick(self, now: float) -> None:
        """Do what is due: deadlines, starts, workers that hang or do not leave."""
        self._outcomes.expire(now)
        self._launch_first(now)
        for slot in self.slots:
            if slot.restart_at is not None and slot.restart_at <= now:
                self._launch(slot, now)
            limit = self._limit(slot)
            if limit is not None and now >= limit:
                if slot.ended_at is not None:
                    slot.lost += slot.outstanding
                    slot.outstanding.clear()
                    self._settle(slot, now)
                elif slot.killed_at is not None:
                    self._abandon(slot)
                else:
                    self._kill_hung(slot, now)
        self._retire_idle(now)
        self._departures.tick(now)

    def wake_at(self) -> float | None:
        """When ``tick`` has something to do next, if nothing is reported before."""
        times = [self.queue.next_deadline(), *self._departures.wake_at()]
        for slot in self.slots:
            times += [slot.restart_at, self._limit(slot)]
            if self.queue.waiting_tokens and slot.room_at is not None and slot.room_at > self._dispatched_at:
                times.append(slot.room_at)
        times += [scaling.idle_until(slot, self.config) for slot in self._retirable()]
        return min((t for t in times if t is not None), default=None)

    def dispatch(self, now: float) -> None:
        """Send slices while pairs wait and slots have room; every slot gets its first before any gets its second."""
        self._dispatched_at = now
        while self.queue.waiting_tokens:
            room = [slot for slot in self.slots if slot.has_room(now)]
            if not room:
                break
            slot = min(room, key=lambda slot: len(slot.outstanding))
            slice_ = self.queue.take(self._next_tokens(slot, now))
            if slice_ is None:
                break
            slot.send(slice_, now)
        self._wake_for_work(now)

    def fail_all(self, error: RerankError) -> None:
        """Fail every request that is left."""
        self._outcomes.fail_all(error)

    def close(self, now: float, *, kill: bool, successor: Deployment | None = None) -> None:
        """End the workers, at once or after what they run; ``join`` waits for it.

        Args:
            successor: the deployment that a reload has put in this one's place, on the same seats.
        """
        for slot in self.slots:
            if successor is not None and slot.worker is not None:
                self._note_exit(slot, "reloaded")
                for other in successor.slots:
                    if other.index == slot.index and other.seat == slot.seat:
                        other.last_exit = slot.last_exit
            kill_it = kill or slot.loading  # whoever is loading has nothing to finish
            slot.state = SlotState.CLOSED
            slot.restart_at = None
            if slot.worker is not None and kill_it and slot.seat.place is None:  # a cluster's processes stay
                slot.worker.kill()
            self._end_worker(slot, now)
        self._closed = True
        self._departures.close(now)

    @property
    def alive(self) -> bool:
        """Whether a worker that was told to leave has not ended yet, or what it was forked from."""
        return self._departures.alive

    def template_pids(self) -> list[int]:
        """The processes that the workers are forked from."""
        return [] if self._templates is None else self._templates.pids()

    def join(self) -> None:
        """Wait until every worker has ended, killing those that outstay their grace."""
        self._departures.join()

    def workers(self) -> list[WorkerInfo]:
        """Each slot, as callers see it."""
        return [slot.info() for slot in self.slots]

    def _slice_tokens(self, slot: Slot[Slice]) -> int:
        """Estimated tokens of a full slice."""
        tokens = self.config.slice_tokens or self._batch_tokens(slot) * BATCHES_A_SLICE
        return int(tokens * self._outcomes.overestimate)

    def _next_tokens(self, slot: Slot[Slice], now: float) -> int:
        """Estimated tokens of the next slice for ``slot``."""
        least = int(MIN_SLICE_TOKENS * self._outcomes.overestimate)
        others = [other for other in self.slots if other is not slot and other.state is SlotState.READY]
        own, *left = (other.tokens_left(now) if other.outstanding else None for other in (slot, *others))
        return next_tokens(self.queue.waiting_tokens, own, left, self._slice_tokens(slot), least)

    def _batch_tokens(self, slot: Slot[Slice]) -> int:
        return self.config.batch_tokens or default_batch_tokens(self.spec, slot.seat.device)

    def _wake_for_work(self, now: float) -> None:
        resting = next((slot for slot in self.slots if slot.state is SlotState.RESTING), None)
        if resting is not None:
            a_slice = self._slice_tokens(resting)
            for slot in scaling.wanted(self.slots, self.config, self.queue.waiting_tokens, a_slice):
                self._launch(slot, now)

    def _retirable(self) -> list[Slot[Slice]]:
        """The slots whose workers may be let go, once they have been idle for long enough."""
        return [] if self._closed or self.queue.waiting_tokens else scaling.retirable(self.slots, self.config)

    def _retire_idle(self, now: float) -> None:
        """Let those workers go that have had nothing to do for ``idle_timeout``, the last first."""
        for slot in reversed(self._retirable()):
            if now >= scaling.idle_until(slot, self.config):
                self._note_exit(slot, "idle_timeout")
                self._end_worker(slot, now)
                slot.state = SlotState.RESTING

    # Starting.

    def _launch_first(self, now: float) -> None:
        """Launch the first workers of seats: all, or one to fetch a hub's model for the others, or one half in turn."""
        for slot in list(self.slots):
            if slot.generation or slot.state is not SlotState.STARTING:
                continue
            fetching = not self.spec.local and not self._fetched and any(other.generation for other in self.slots)
            if self.failure is not None or fetching:
                return
            if slot.seat.place is not None and self._in_turn and not self._started:
                remote = [other for other in self.slots if other.seat.place is not None]
                if sum(other.loading for other in remote) >= max(1, len(remote) // 2):
                    return
            self._launch(slot, now)

    def _launch(self, slot: Slot[Slice], now: float) -> None:
        rested = slot.state is SlotState.RESTING
        slot.state = SlotState.RESTARTING if slot.generation else SlotState.STARTING
        if slot.generation:
            self._counts.restarts += not rested
            assert slot.last_exit is not None
            logger.info(
                "worker %d on %s: starting generation %d; the one before ended: %s",
                *(slot.index, slot.seat.device, slot.generation + 1, slot.last_exit.reason),
            )
        # A hub that has given the model once is not asked again: it may be down by then.
        offline = not self.spec.local and self._fetched
        try:
            slot.launch(self.spec, self.config, self._batch_tokens(slot), self._templates, offline=offline, now=now)
        except Exception as error:  # the system has no thread left
            self._launch_failed(slot, LaunchError.of(error), now)

    def _launch_failed(self, slot: Slot[Slice], error: LaunchError, now: float) -> None:
        """Try again what may work another time. What never worked and cannot is an error at once."""
        how = f"could not be launched: {error}"
        logger.warning(
            "worker %d on %s could not be launched: %s [mp-rerank explain worker-not-launched]",
            *(slot.index, slot.seat.device, error),
        )
        if error.details:
            logger.debug("%s", error.details)
        self._note_exit(slot, "launch_failed")
        self._end_worker(slot, now)
        if error.hopeless and not self._started:
            self._give_up(slot, WorkerCrashedError(f"the worker on {slot.seat.device} {how}", device=slot.seat.device))
        else:
            self._count_crash(slot, how, now)

    def _loaded(self, slot: Slot[Slice], error: BaseException | None, now: float) -> None:
        if isinstance(error, BrokenExecutor):
            self._make_sure_it_ends(slot, now)
        elif isinstance(error, SeatLeftError):
            self._leave(slot, now)
        elif isinstance(error, LaunchError):
            self._launch_failed(slot, error, now)
        elif error is not None:
            self._load_failed(slot, error, now)
        else:
            slot.waiting = self._fetched = True
            self._launch_first(now)
            self._agreement.describe_waiting(self.slots)

    def _described(self, slot: Slot[Slice], outcome: WorkerFacts | BaseException, now: float) -> None:
        if isinstance(outcome, BrokenExecutor):
            self._make_sure_it_ends(slot, now)
            return
        if isinstance(outcome, WorkerFacts):
            self._agreement.learn_recipe(slot, outcome)
            self._agreement.describe_waiting(self.slots)
            difference = self._agreement.check(slot, outcome)
            if difference is None:
                slot.facts = outcome
                slot.seconds_per_token = 1.0 / outcome.tokens_per_second
                slot.state = SlotState.READY
                slot.since = now
                self._started = self._started or self.ready
                logger.debug("%r is ready: %s", slot, outcome)
                return
            outcome = difference
        self._load_failed(slot, outcome, now)

    def _load_failed(self, slot: Slot[Slice], error: BaseException, now: float) -> None:
        if not isinstance(error, ModelLoadError):
            error = ModelLoadError(
                f"{self.spec.name} could not be loaded on {slot.seat.device}: {error!r}",
                model=self.spec.name,
                device=slot.seat.device,
                cause=repr(error),
            )
        self._note_exit(slot, "load_failed")
        self._end_worker(slot, now)
        if self._started:
            logger.warning("worker %d: %s [mp-rerank explain worker-not-loaded]", slot.index, error)
            self._count_crash(slot, str(error), now, error)
        else:
            self._give_up(slot, error)

    # Scoring.

    def _slice_ended(self, slot: Slot[Slice], report: SliceEnded, now: float) -> None:
        slice_, outcome = report.slice_, report.outcome
        if slice_ not in slot.outstanding:
            return  # given up as lost
        slot.outstanding.remove(slice_)
        if isinstance(outcome, BrokenExecutor):
            if isinstance(outcome, NotBegunError):  # nothing that killed its worker
                self.queue.put_back(slice_)
            else:
                slot.lost.append(slice_)
            self._make_sure_it_ends(slot, now)
            self._settle(slot, now)
            return
        if isinstance(outcome, BaseException):
            slot.since = now
            slot.crashes = 0
            self._outcomes.raised(slice_, outcome, slot.seat.device)
        else:
            slot.took(slice_, outcome.seconds, now)
            self._scored = True
            self._blamed.clear()
            self._outcomes.scored(slice_, outcome, slot.seat.device, now)
        if slot.state is SlotState.READY:
            slot.worn_out = self._worn(slot)
            if slot.worn_out is not None:
                slot.state = SlotState.DRAINING
        if slot.state is SlotState.DRAINING and not slot.outstanding:
            self._counts.recycled += 1
            assert slot.worn_out is not None
            self._note_exit(slot, slot.worn_out)
            self._end_worker(slot, now)
            self._launch(slot, now)
        self._settle(slot, now)

    # Recycling, hanging, dying.

    def _worn(self, slot: Slot[Slice]) -> ExitReason | None:
        """Why the slot's worker is to be replaced now, if it is: one at a time, so no other may be away."""
        slices, memory = self.config.max_slices_per_worker, self.config.max_memory_per_worker
        if slices is None and memory is None:
            return None
        if any(other.state not in (SlotState.READY, SlotState.RESTING, SlotState.FAILED) for other in self.slots):
            return None
        if slices is not None and slot.scored_slices >= slices:
            return "recycled_slices"
        assert slot.worker is not None
        too_large = memory is not None and (slot.worker.resident_bytes() or 0) > memory
        return "recycled_memory" if too_large else None

    def _limit(self, slot: Slot[Slice]) -> float | None:
        """When the slot's worker counts as hung; of one that was killed, as unkillable; of one that has ended, when
        its slices count as lost.
        """
        if slot.worker is None:
            return None  # let go, with whatever it was at
        if slot.ended_at is not None:
            return slot.ended_at + LOST_AFTER_SECONDS if slot.outstanding else None
        if not slot.worker.killable:
            return None
        if slot.killed_at is not None:
            return slot.killed_at + KILL_GRACE_SECONDS
        if slot.loading:
            return None if self.config.start_timeout is None else slot.since + self.config.start_timeout
        if not slot.outstanding or self.config.hang_timeout is None:
            return None
        expected = slot.outstanding[0].tokens * slot.seconds_per_token
        return slot.since + self.config.hang_timeout + HANG_MARGIN * expected

    def _kill_hung(self, slot: Slot[Slice], now: float) -> None:
        doing = "loading its model" if slot.loading else f"scoring {len(slot.outstanding[0])} pairs"
        logger.warning(
            "worker %d on %s has been %s for %.1f s: killed [mp-rerank explain worker-hung]",
            *(slot.index, slot.seat.device, doing, now - slot.since),
        )
        slot.hung = True
        self._make_sure_it_ends(slot, now)

    def _exited(self, slot: Slot[Slice], report: Exited, now: float) -> None:
        slot.idle_death = slot.state is SlotState.READY and not slot.outstanding and not slot.lost
        slot.ended_at = now
        slot.exit_code = report.exit_code
        self._make_sure_it_ends(slot, now)
        self._settle(slot, now)

    def _make_sure_it_ends(self, slot: Slot[Slice], now: float) -> None:
        """Give the slot's worker nothing more, and end it: it hangs, has ended, or its executor has given it up."""
        if slot.state in (SlotState.READY, SlotState.DRAINING):
            slot.state = SlotState.RESTARTING
        if slot.worker is not None:
            slot.worker.kill()
            if slot.killed_at is None:
                slot.killed_at = now

    def _abandon(self, slot: Slot[Slice]) -> None:
        """Give up a worker that does not end although it was killed, and its seat. Nobody is to blame."""
        assert slot.worker is not None
        for slice_ in reversed([*slot.lost, *slot.outstanding]):
            self.queue.put_back(slice_)
        slot.lost.clear()
        slot.outstanding.clear()
        pid = slot.worker.pid
        slot.worker.abandon()
        slot.worker = None
        self._note_exit(slot, "unkillable")
        words = (
            f"worker {slot.index} on {slot.seat.device} (process {pid}) was killed {KILL_GRACE_SECONDS:g} s ago and "
            "has not ended: the system does not end it (it may be in a system call that cannot be interrupted, or in "
            "a frozen control group)"
        )
        self._give_up(slot, WorkerCrashedError(words, device=slot.seat.device))

    def _note_exit(self, slot: Slot[Slice], reason: ExitReason) -> None:
        """Keep, count and log how the slot's worker ended."""
        slot.waiting = False
        if self._agreement.gone(slot):
            self._agreement.describe_waiting(self.slots)
        name = _signal_name(slot.exit_code)
        slot.last_exit = WorkerExit(reason, slot.exit_code, name, time.time())
        self._counts.exits[reason] = self._counts.exits.get(reason, 0) + 1
        how = "" if slot.exit_code is None else f", {_exit_in_words(slot.exit_code)}"
        logger.info(
            "worker %d on %s, generation %d, ended: %s%s",
            *(slot.index, slot.seat.device, slot.generation, reason, how),
        )

    def _settle(self, slot: Slot[Slice], now: float) -> None:
        """Act on a death, once its process has ended and its slices are back."""
        if slot.ended_at is None or slot.worker is None or slot.outstanding or slot.state is SlotState.CLOSED:
            return
        if slot.worker.left:
            for slice_ in reversed(slot.lost):
                self.queue.put_back(slice_)
            slot.lost = []
            self._leave(slot, now)
            return
        device = slot.seat.device
        code = _exit_in_words(slot.exit_code)
        if slot.hung:
            how = "hung and was killed"
            logger.warning("worker %d on %s hung and was killed [mp-rerank explain worker-hung]", slot.index, device)
        else:
            how = f"died with {code}"
            logger.warning("worker %d on %s died with %s [mp-rerank explain worker-died]", slot.index, device, code)
        self._counts.crashes += 1
        self._note_exit(slot, _reason_of_death(slot))
        lost, slot.lost = slot.lost, []
        for slice_ in reversed(lost[1:]):
            self.queue.put_back(slice_)
        suspects = []
        if lost:
            suspects = self._outcomes.crashed(lost[0], self.config.max_attempts, device, slot.exit_code, how)
        if suspects and self._scored:
            # The deaths are explained, and the model is known to score: they say nothing against the seats. Unless it
            # is one pair after the other, and no score between: then the model has come to die of everything.
            self._blamed.update(suspect.request.keys[suspect.index] for suspect in suspects)
            if len(self._blamed) <= self.config.max_restarts:
                for other in self.slots:
                    other.crashes = 0
        self._end_worker(slot, now)
        self._count_crash(slot, how, now)

    def _count_crash(self, slot: Slot[Slice], how: str, now: float, error: RerankError | None = None) -> None:
        """Restart at once, after a back-off, or not any more."""
        device = slot.seat.device
        slot.crashes += 1
        slot.worker = None
        if slot.crashes > self.config.max_restarts:
            self._give_up(
                slot,
                error
                or WorkerCrashedError(
                    f"{slot.crashes} workers in a row ended on {device}, nothing scored between; the last {how}",
                    device=slot.seat.device,
                    exit_code=slot.exit_code,
                    attempts=slot.crashes,
                ),
            )
            return
        slot.state = SlotState.RESTARTING if self._started else SlotState.STARTING
        delay = 0.0
        if slot.crashes > 1:
            delay = min(MAX_BACKOFF_SECONDS, self.config.restart_backoff * 2.0 ** (slot.crashes - 2))
        slot.restart_at = now + delay

    def _give_up(self, slot: Slot[Slice], error: RerankError) -> None:
        slot.state = SlotState.FAILED
        slot.restart_at = None
        logger.error(
            "worker %d on %s is given up: %s [mp-rerank explain worker-given-up]",
            *(slot.index, slot.seat.device, error),
        )
        if not self._started or all(other.state is SlotState.FAILED for other in self.slots):
            self.failure = error
            self.fail_all(error)

    def _leave(self, slot: Slot[Slice], now: float) -> None:
        """Do without a slot whose seat the cluster has taken away. It has one again if it comes back."""
        self._note_exit(slot, "left")
        self._end_worker(slot, now)
        slot.state = SlotState.CLOSED
        self.slots.remove(slot)
        if any(other.generation for other in self.slots):
            self._started = self._started or self.ready
        self._launch_first(now)  # others may have waited for it
        self._check_seats()

    def _check_seats(self) -> None:
        """Fail where there is no seat, and none to come."""
        if any(slot.state is not SlotState.FAILED for slot in self.slots) or self.failure is not None:
            return
        if self._lost is None and self._started:
            return  # they may come back
        self.failure = self._lost or ClusterError("every worker left the cluster before the model was loaded")
        self.fail_all(self.failure)

    def _end_worker(self, slot: Slot[Slice], now: float) -> None:
        """Let go of the slot's worker; what it says from here on is stale."""
        if slot.worker is not None:
            self._departures.let_go(slot.worker, now)
            slot.worker = None


def _kept_scores(count: int) -> MutableMapping[Hashable, tuple[Score, Reading | None]] | None:
    """Room for the scores of the ``count`` pairs scored or asked for last."""
    if not count:
        return None
    from cachetools import LRUCache  # not everybody's

    return LRUCache(count)


def _reason_of_death(slot: Slot[Slice]) -> ExitReason:
    if slot.hung:
        return "hung"
    if slot.exit_code == EXIT_DEVICE_LOST:
        return "device_lost"
    return "idle_death" if slot.idle_death else "crashed"


def _exit_in_words(exit_code: int | None) -> str:
    if exit_code is None:
        return "an unknown exit code"
    name = _signal_name(exit_code)
    return f"{name} (exit code {exit_code})" if name else f"exit code {exit_code}"


def _signal_name(exit_code: int | None) -> str:
    """The signal that ended a process with this exit code; empty if none did."""
    if exit_code is None or exit_code >= 0:
        return ""
    try:
        return signal.Signals(-exit_code).name
    except ValueError:
        return f"signal {-exit_code}"
