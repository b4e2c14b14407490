"""One seat of the pool: a device, and the worker that has the seat now.

A slot outlives its workers and counts them as generations. Nothing here decides: the deployment says what to launch,
send and end; the slot does it and reports what comes of it through ``notify``, from whichever thread learns it. A
report names its generation, so that the last words of a dead worker are not taken for its successor's.

    STARTING ---- loaded, described ---> READY ---- worn out -----> DRAINING
       |  ^                              ^   |                          |
       |  | died, and is tried again     |   | died, hung               | its slices are back
       |  |                    described |   v                          v
       |  +------------------------- RESTARTING <-----------------------+
       |                                 |
       +-- could not load ---> FAILED <--+  too many deaths in a row, or a worker that cannot be killed

                                 READY ---- nothing to do for long ----> RESTING ---- work waits ----> RESTARTING

    any state ---- the pool closes, or a reload lets the deployment go ----> CLOSED
"""

from __future__ import annotations

import enum
import pickle
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from mp_rerank._pairs import Pair, PairOptions
from mp_rerank._planning.plan import Seat
from mp_rerank._recipe import Recipe
from mp_rerank._workers.child import Launch, Scored, WorkerFacts
from mp_rerank._workers.handle import Templates, WorkerHandle, make_handle
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.results import ExitReason, WorkerExit, WorkerInfo

__all__ = ["Described", "Exited", "Loaded", "NotBegunError", "Report", "SliceEnded", "Slot", "SlotState"]


class Work(Protocol):
    """What a slot sends to its worker at a time: the scheduling's slice."""

    @property
    def pairs(self) -> Sequence[Pair]:
        """The texts to score."""

    @property
    def options(self) -> Sequence[PairOptions] | None:
        """How each is read; ``None``: plainly."""

    @property
    def tokens(self) -> int:
        """Their estimated tokens."""


_T = TypeVar("_T")
_Slice = TypeVar("_Slice", bound=Work)

# A worker has one slice running and one waiting, so that it never idles for want of the dispatcher.
SLICES_A_SLOT = 2
# The second is sent when so much of the time that the first should take has passed: what arrives until then can still
# come before it, and a slice that runs faster than the worker's measured speed still has the next behind it. At once
# where the first should be done before the dispatcher has looked again.
AHEAD_SHARE = 0.75
SOON_SECONDS = 0.01
# Weight of the newest slice in a worker's measured speed.
SPEED_SMOOTHING = 0.2


class NotBegunError(BrokenExecutor):
    """The worker was not there any more when a slice came: it has not seen it."""


class SlotState(enum.Enum):
    """Where a slot is in its life."""

    STARTING = "starting"  # its first worker is loading, or has yet to be launched
    READY = "ready"
    DRAINING = "draining"  # its worker finishes what it has and is then replaced
    RESTARTING = "restarting"  # a later worker is loading, or waits for its back-off
    RESTING = "resting"  # it has no worker, and gets one when there is work for it
    FAILED = "failed"  # given up
    CLOSED = "closed"


@dataclass(frozen=True)
class Loaded:
    """A worker has loaded its model, or could not: then with the error."""

    slot: Slot[Any]
    generation: int
    error: BaseException | None


@dataclass(frozen=True)
class Described:
    """A worker has made its model fast and proved it, or could not."""

    slot: Slot[Any]
    generation: int
    outcome: WorkerFacts | BaseException


@dataclass(frozen=True)
class SliceEnded:
    """A slice came back scored, or with the error that ended it."""

    slot: Slot[Any]
    generation: int
    slice_: Any
    outcome: Scored | BaseException


@dataclass(frozen=True)
class Exited:
    """A worker process has ended; negative exit codes are signals."""

    slot: Slot[Any]
    generation: int
    exit_code: int | None


Report = Loaded | Described | SliceEnded | Exited


class Slot(Generic[_Slice]):
    """A seat and its present worker. The dispatcher's thread alone calls it and reads it.

    Attributes:
        waiting: whether the worker has loaded its model, and waits to be told how to make it fast.
        outstanding: the slices its worker has: the first is running.
        lost: slices of a worker that died, in the order they were sent.
        since: when the worker began what it is doing: loading, or the first of ``outstanding``.
        crashes: deaths in a row, nothing scored between.
        restart_at: when to launch again, while there is no worker.
        ended_at: when the present generation's worker was known to have ended, once it has.
        exit_code: of the worker that ended, from its report until the next launch.
        killed_at: when the worker was first killed, or found to be ending.
        hung: whether it was killed for taking too long.
        idle_death: whether it had nothing to do when it ended.
        worn_out: why it is to be replaced, while it is draining.
        last_exit: how the worker before the present one ended.
        seconds_per_token: the worker's speed. Not its inverse: one slice measured far too fast would then pass for the
            speed of many, and the next ones for hung.
    """

    def __init__(self, index: int, seat: Seat, notify: Callable[[Report], None]) -> None:
        self.index = index
        self.seat = seat
        self.notify = notify
        self.state = SlotState.STARTING
        self.generation = 0
        self.worker: WorkerHandle | None = None
        self.facts: WorkerFacts | None = None
        self.waiting = False
        self.outstanding: deque[_Slice] = deque()
        self.lost: list[_Slice] = []
        self.since = 0.0
        self.crashes = 0
        self.restart_at: float | None = None
        self.ended_at: float | None = None
        self.exit_code: int | None = None
        self.killed_at: float | None = None
        self.hung = False
        self.idle_death = False
        self.worn_out: ExitReason | None = None
        self.last_exit: WorkerExit | None = None
        self.scored_slices = 0
        self.seconds_per_token = 0.0

    def __repr__(self) -> str:
        return f"<Slot {self.index}: {self.state.value} on {self.seat.device}, generation {self.generation}>"

    def has_room(self, now: float) -> bool:
        """Whether it would take another slice."""
        at = self.room_at
        return at is not None and at <= now

    @property
    def room_at(self) -> float | None:
        """From when on it would take another slice; ``None``: not before one has ended."""
        if self.state is not SlotState.READY or len(self.outstanding) >= SLICES_A_SLOT:
            return None
        if self.seat.place is not None and self.seat.place.loading:
            return None  # a reload's new model, in the same process: the worker scores nothing meanwhile
        if not self.outstanding:
            return self.since
        expected = self.outstanding[0].tokens * self.seconds_per_token
        return self.since + AHEAD_SHARE * expected if expected > SOON_SECONDS else self.since

    def tokens_left(self, now: float) -> float:
        """Estimated tokens that its worker has yet to score."""
        if not self.outstanding:
            return 0.0
        scored = (now - self.since) / self.seconds_per_token if self.seconds_per_token else 0.0
        return sum(slice_.tokens for slice_ in self.outstanding) - min(scored, self.outstanding[0].tokens)

    @property
    def loading(self) -> bool:
        """Whether its worker has been launched and has not described itself yet."""
        return self.state in (SlotState.STARTING, SlotState.RESTARTING) and self._has_live_worker

    @property
    def _has_live_worker(self) -> bool:
        return self.worker is not None and self.ended_at is None

    def launch(
        self,
        spec: ModelSpec,
        config: PoolConfig,
        batch_tokens: int,
        templates: Templates | None,
        *,
        offline: bool,
        now: float,
    ) -> None:
        """Start the next generation. Raises ``OSError`` or ``RuntimeError`` where the system would start no more."""
        self.generation += 1
        self.worker = None
        self.waiting = False
        self.facts = None
        self.restart_at = None
        self.ended_at = None
        self.exit_code = None
        self.killed_at = None
        self.hung = False
        self.idle_death = False
        self.worn_out = None
        self.scored_slices = 0
        self.seconds_per_token = 0.0
        self.since = now
        generation = self.generation
        launch = Launch(
            name=f"mp_rerank-{self.index}.{generation}",
            spec=pickle.dumps(spec),
            device=self.seat.device,
            threads=self.seat.threads,
            batch_tokens=batch_tokens,
            cpus=self.seat.cpus,
            offline=offline,
        )
        self.worker = make_handle(
            config, launch, lambda code: self.notify(Exited(self, generation, code)), templates, self.seat.place
        )

        def loaded(future: Future[None]) -> None:
            outcome = _outcome(future)
            self.notify(Loaded(self, generation, outcome if isinstance(outcome, BaseException) else None))

        self.worker.loaded.add_done_callback(loaded)

    def describe(self, recipe: Recipe | None) -> None:
        """Have the worker, which has loaded its model, make it fast and prove it."""
        assert self.worker is not None
        self.waiting = False
        generation = self.generation
        try:
            future = self.worker.describe(recipe)
        except RuntimeError:  # broken or shut down a moment ago
            self.notify(Described(self, generation, BrokenExecutor()))
            return

        def described(future: Future[WorkerFacts]) -> None:
            outcome = _outcome(future)
            self.notify(Described(self, generation, outcome))

        future.add_done_callback(described)

    def send(self, slice_: _Slice, now: float) -> None:
        """Give ``slice_`` to the worker."""
        assert self.worker is not None
        if not self.outstanding:
            self.since = now
        self.outstanding.append(slice_)
        generation = self.generation
        try:
            future = self.worker.score(slice_.pairs, slice_.options)
        except RuntimeError:  # broken or shut down a moment ago; reported like any other end
            self.notify(SliceEnded(self, generation, slice_, NotBegunError()))
            return

        def ended(future: Future[Scored]) -> None:
            outcome = _outcome(future)
            self.notify(SliceEnded(self, generation, slice_, outcome))

        future.add_done_callback(ended)

    def took(self, slice_: _Slice, seconds: float, now: float) -> None:
        """Note that ``slice_`` came back scored after ``seconds`` in the worker."""
        self.since = now
        self.crashes = 0
        self.scored_slices += 1
        self.seconds_per_token += SPEED_SMOOTHING * (seconds / slice_.tokens - self.seconds_per_token)

    def info(self) -> WorkerInfo:
        """The slot as callers see it."""
        shown = WorkerInfo(
            slot=self.index,
            state=self.state.value,
            generation=self.generation,
            device=self.seat.device,
            threads=self.seat.threads,
            pid=self.worker.pid if self._has_live_worker and self.worker is not None else None,
            last_exit=self.last_exit,
            place=str(self.seat.place or ""),
        )
        facts = self.facts
        if facts is None:
            return shown
        return replace(
            shown,
            dtype=facts.dtype,
            load_seconds=facts.load_seconds,
            weights_bytes=facts.weights_bytes,
            mapped_bytes=facts.mapped_bytes,
            num_labels=facts.num_labels,
            activation=facts.activation,
            max_length=facts.max_length,
            prompts=tuple(facts.prompts),
            optimizations=facts.recipe.names() if facts.recipe else (),
            canary=facts.canary,
            tokens_per_second=1.0 / max(self.seconds_per_token, 1e-9),
        )


def _outcome(future: Future[_T]) -> _T | BaseException:
    """What ``future`` holds; a cancelled one was dropped by a shutdown."""
    if future.cancelled():
        return NotBegunError("the worker was told to leave")
    error = future.exception()
    return error if error is not None else future.result()
