"""The manager of `ModelPools`: starts and retires pools within a bound on memory, and lets requests use them.

One thread, the manager, starts and retires pools; it waits for its inbox and for nothing else.

    request    table -> tenant.enter()                                                 -> a lease, where its pool runs
               else inbox.put(Acquire), wait                                           -> a lease
    manager    plan (on a thread of its own) -> line -> room? -> start -> leases for all who wait
               no room: tenants leave; once they have no lease, their pools are closed
    request    dispatcher.submit; the lease ends with the future

Who uses a pool, and how without a lock: `_tenants`.
"""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, fields, replace

from mp_rerank._planning.plan import estimate_memory, make_plan
from mp_rerank._scheduling.futures import Answer, is_pool_thread
from mp_rerank._tenants import Acquire, Key, Lease, Tenant
from mp_rerank._workers.green import make_queue
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import ModelLoadError, PoolClosedError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import KeptModel, ModelPoolsStats

__all__ = ["Manager", "Retire"]

logger = QueuedLogger(POOL_LOGGER)

# Without ``workers``, a pool has as many as take this part of the bound, so that there is room for another model.
SHARE_OF_ONE = 0.5
# While a model waits for room, those that run are measured no more often: it takes milliseconds a worker.
MEASURE_SECONDS = 1.0


@dataclass(frozen=True)
class _Fitted:
    config: PoolConfig
    workers: int
    size: int


@dataclass(frozen=True, eq=False)
class _Planned:
    tenant: Tenant
    outcome: _Fitted | BaseException


@dataclass(frozen=True, eq=False)
class _Started:
    tenant: Tenant


@dataclass(frozen=True, eq=False)
class _Left:
    tenant: Tenant


@dataclass(frozen=True, eq=False)
class _Ended:
    tenant: Tenant


@dataclass(frozen=True, eq=False)
class Retire:
    key: Key
    drain: bool
    gone: Answer[None]


@dataclass(frozen=True)
class _Snapshot:
    """What is kept at one moment; and the pools of those that can be measured."""

    counts: ModelPoolsStats
    pools: tuple[RerankerPool | None, ...]


@dataclass(frozen=True, eq=False)
class _Ask:
    answer: Answer[_Snapshot]


@dataclass(frozen=True, eq=False)
class _Close:
    drain: bool


_Message = Acquire | _Planned | _Started | _Left | _Ended | Retire | _Ask | _Close


class Manager:
    """The thread that starts and retires pools. It alone changes what is below; others read it.

    Attributes:
        limit: the bound, in bytes.
        table: the tenants that new requests find.
        leaving: those that they do not find, whose workers may still be there.
        line: of the table's tenants those that wait for room, first come, first served.
        closed: whether nothing is taken any more.
        ended: given once all workers have ended after the close.
        begun: whether there was ever something to do.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.table: dict[Key, Tenant] = {}
        self.leaving: list[Tenant] = []
        self.line: deque[Tenant] = deque()
        self.closed = False
        self.ended: Answer[None] = Answer()
        self.begun = False
        self.owner = os.getpid()
        self._started = self._retired = self._failed = 0
        self._retirements: list[tuple[Answer[None], list[Tenant]]] = []  # who waits until which are gone
        self._inbox: queue.SimpleQueue[_Message] = make_queue()
        self._running = threading.Lock()  # taken, and never given back, by the thread that runs the loop
        self._finished = False

    # What other threads call.

    def begin(self) -> None:
        """Start the thread, unless it runs. Of two that are started at once, the second ends at once."""
        if not self._running.locked():
            self.begun = True
            try:
                threading.Thread(target=self._run, name="mp_rerank-models", daemon=True).start()
            except RuntimeError:  # no thread to be had
                self.begun = self._running.locked()
                raise

    def put(self, message: _Message) -> None:
        """Hand over a message; returns at once."""
        self._inbox.put(message)
        # The loop sets _finished and then empties the inbox; so either it has seen this message or we see the flag.
        if self._finished:
            self._turn_away()

    def close(self, *, drain: bool) -> None:
        """Let nothing in, and end all pools. Returns at once."""
        self.closed = True
        if not self.begun:
            self.ended.give(None)
        else:
            self.put(_Close(drain))

    def stats(self) -> ModelPoolsStats:
        """A copy, taken at one moment; measured a moment later, on the calling thread."""
        if not self.begun or os.getpid() != self.owner or is_pool_thread():
            return _measured(self._snapshot())
        asked = _Ask(Answer())
        self.put(asked)
        return _measured(asked.answer.get())

    def _snapshot(self) -> _Snapshot:
        kept: list[KeptModel] = []
        pools: list[RerankerPool | None] = []
        for tenant in (*list(self.table.values()), *list(self.leaving)):
            kept.append(
                KeptModel(
                    model=tenant.spec.name,
                    state=tenant.state,
                    memory=tenant.size,
                    measured=tenant.measured_at > -math.inf,
                    workers=tenant.workers,
                    requests=len(tenant.leases),
                    waiting=len(tenant.waiters),
                    idle_seconds=0.0 if tenant.leases else max(0.0, time.monotonic() - tenant.used),
                )
            )
            pools.append(tenant.pool if tenant.state in ("ready", "leaving") else None)
        counts = ModelPoolsStats(self.limit, 0, tuple(kept), self._started, self._retired, self._failed)
        return _Snapshot(counts, tuple(pools))

    # The loop.

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return  # another thread was first
        error = PoolClosedError("the ModelPools are closed")
        try:
            while not (self.closed and not self.table and not self.leaving):
                self._handle(self._inbox.get())
        except BaseException as bug:
            logger.exception("the manager of ModelPools failed [mp-rerank explain manager-failed]")
            error = PoolClosedError(f"the manager of ModelPools failed: {bug!r}")
        finally:
            self.closed = True
            for tenant in (*self.table.values(), *self.leaving):
                self._fail_waiters(tenant, error)
                self._close_pool(tenant, drain=False)
            for gone, _ in self._retirements:
                gone.give(None)
            self._finished = True
            self._turn_away()
            self.ended.give(None)

    def _handle(self, message: _Message) -> None:
        if isinstance(message, Acquire):
            self._acquire(message)
        elif isinstance(message, _Planned):
            self._planned(message.tenant, message.outcome)
        elif isinstance(message, _Started):
            self._ready(message.tenant)
        elif isinstance(message, _Left):
            if message.tenant.state == "leaving" and not message.tenant.leases:
                self._close_pool(message.tenant, drain=True)
        elif isinstance(message, _Ended):
            self._forget(message.tenant)
        elif isinstance(message, Retire):
            self._retire_asked(message)
        elif isinstance(message, _Ask):
            message.answer.give(self._snapshot())
            return
        else:
            self._close_all(message.drain)
        self._advance()
        self._answer_retirements()

    def _turn_away(self) -> None:
        """Answer what reached the inbox after the loop ended; any thread may."""
        while True:
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                return
            if isinstance(message, Acquire):
                message.answer.fail(PoolClosedError("the ModelPools are closed"))
            elif isinstance(message, Retire):
                message.gone.give(None)
            elif isinstance(message, _Ask):
                message.answer.give(self._snapshot())

    # A model comes.

    def _acquire(self, asked: Acquire) -> None:
        if self.closed:
            asked.answer.fail(PoolClosedError("the ModelPools are closed"))
            return
        tenant = self.table.get(asked.key)
        if tenant is not None and tenant.broken:  # its workers are given up, or something else has ended it
            self._leave(tenant)
            tenant = None
        if tenant is not None and tenant.open:
            asked.answer.give(Lease(tenant))
            return
        if tenant is None:
            tenant = Tenant(asked.key, asked.spec, asked.config, lambda tenant: self.put(_Left(tenant)))
            try:
                threading.Thread(target=self._plan, args=(tenant,), name="mp_rerank-plan", daemon=True).start()
            except RuntimeError as error:  # no thread to be had
                asked.answer.fail(error)
                return
            self.table[asked.key] = tenant
        tenant.waiters.append(asked)

    def _plan(self, tenant: Tenant) -> None:
        """On a thread of its own: looking at the machine may take seconds."""
        try:
            self.put(_Planned(tenant, _fit(tenant.spec, tenant.config, self.limit)))
        except BaseException as error:
            self.put(_Planned(tenant, error))

    def _planned(self, tenant: Tenant, outcome: _Fitted | BaseException) -> None:
        if self.table.get(tenant.key) is not tenant:  # closed meanwhile
            return
        if isinstance(outcome, BaseException):
            self._fail(tenant, outcome)
            return
        tenant.config, tenant.workers, tenant.size = outcome.config, outcome.workers, outcome.size
        if tenant.size > self.limit:
            words = f"it takes about {_shown(tenant.size)}, and memory={_shown(self.limit)} is the bound of all models"
            error = ModelLoadError(
                f"cannot load {tenant.spec.name}: {words}", model=tenant.spec.name, device="", cause=words
            )
            self._fail(tenant, error)
            return
        tenant.state = "waiting"
        self.line.append(tenant)

    def _advance(self) -> None:
        """Start what there is room for, from the head of the line; make room for the head."""
        while self.line:
            tenant = self.line[0]
            tenant.waiters = [asked for asked in tenant.waiters if not asked.abandoned]
            if not tenant.waiters:
                self.line.popleft()
                del self.table[tenant.key]
            elif self._make_room(tenant.size):
                self.line.popleft()
                self._start(tenant)
            else:
                return

    def _make_room(self, size: int) -> bool:
        """Whether there is room for ``size``; if not, retire what has to be."""
        ready = [tenant for tenant in self.table.values() if tenant.state == "ready"]
        for tenant in ready:
            _remeasure(tenant)
        starting = sum(tenant.size for tenant in self.table.values() if tenant.state == "starting")
        leaving = sum(tenant.size for tenant in self.leaving)
        staying = starting + sum(tenant.size for tenant in ready)
        if staying + leaving + size <= self.limit:
            return True
        if starting + size > self.limit:  # not before these have started can they be retired
            return False
        # Idle ones first; of these, and of the others, whichever was used longest ago.
        for tenant in sorted(ready, key=lambda tenant: (bool(tenant.leases), tenant.used)):
            if staying + size <= self.limit:
                break
            staying -= tenant.size
            self._leave(tenant)
        return False

    def _start(self, tenant: Tenant) -> None:
        tenant.state = "starting"
        try:
            options = {item.name: getattr(tenant.config, item.name) for item in fields(PoolConfig)}
            tenant.pool = RerankerPool(tenant.spec, **options)
            dispatcher = tenant.pool._begin()
        except BaseException as error:
            tenant.pool = None
            self._fail(tenant, error)
            return
        logger.info("%s is being loaded: about %s", tenant.spec.name, _shown(tenant.size))
        dispatcher.ended.on_given(lambda: self.put(_Ended(tenant)))
        dispatcher.started.on_given(lambda: self.put(_Started(tenant)))

    def _ready(self, tenant: Tenant) -> None:
        """Its workers have started, or cannot."""
        dispatcher = tenant.dispatcher
        assert dispatcher is not None
        if tenant.state != "starting":  # closed meanwhile
            return
        if dispatcher.started.error is not None:
            self._fail(tenant, dispatcher.started.error)
            return
        self._started += 1
        tenant.state = "ready"
        tenant.open = True
        _remeasure(tenant)
        logger.info("%s is loaded: %s", tenant.spec.name, _shown(tenant.size))
        waiters, tenant.waiters = tenant.waiters, []
        for asked in waiters:
            if not asked.abandoned:
                asked.answer.give(Lease(tenant))
        if tenant.to_retire:
            self._leave(tenant)
        self._shrink(tenant)

    def _shrink(self, newest: Tenant) -> None:
        """Retire idle ones, if ``newest`` takes more than was estimated."""
        others = [tenant for tenant in self.table.values() if tenant.state == "ready" and tenant is not newest]
        taken = sum(tenant.size for tenant in self.table.values() if tenant.state in ("starting", "ready"))
        for tenant in sorted(others, key=lambda tenant: tenant.used):
            if taken > self.limit and not tenant.leases:
                taken -= tenant.size
                self._leave(tenant)
        if taken > self.limit:
            logger.warning(
                "models take %s of memory, and %s is their bound [mp-rerank explain models-above-bound]",
                *(_shown(taken), _shown(self.limit)),
            )

    # A model goes.

    def _leave(self, tenant: Tenant) -> None:
        """Let no new request find it, and end its workers once those it has are done."""
        tenant.state = "leaving"
        tenant.open = False  # first, and then the look: see the top of this module
        self.table.pop(tenant.key, None)
        self.leaving.append(tenant)
        self._retired += 1
        logger.info("%s is being retired", tenant.spec.name)
        if not tenant.leases:
            self._close_pool(tenant, drain=True)

    def _fail(self, tenant: Tenant, error: BaseException) -> None:
        """It cannot be started, and is not kept: who asks next tries again."""
        self._failed += 1
        if self.table.get(tenant.key) is tenant:
            del self.table[tenant.key]
        self._fail_waiters(tenant, error)
        if tenant.dispatcher is not None:
            tenant.state = "leaving"
            self.leaving.append(tenant)  # until its workers have ended
            self._close_pool(tenant, drain=False)

    def _fail_waiters(self, tenant: Tenant, error: BaseException) -> None:
        waiters, tenant.waiters = tenant.waiters, []
        for asked in waiters:
            asked.answer.fail(error)

    def _close_pool(self, tenant: Tenant, *, drain: bool) -> None:
        if tenant.dispatcher is not None and not (tenant.closing and drain):
            tenant.closing = True
            tenant.dispatcher.close(drain=drain)

    def _forget(self, tenant: Tenant) -> None:
        """Its workers have ended."""
        if tenant in self.leaving:
            self.leaving.remove(tenant)
        elif self.table.get(tenant.key) is tenant:  # not by our doing
            tenant.open = False
            del self.table[tenant.key]
            self._fail_waiters(tenant, PoolClosedError("the pool was closed"))

    def _retire_asked(self, message: Retire) -> None:
        tenants = [tenant for tenant in self.leaving if tenant.key == message.key]
        tenant = self.table.get(message.key)
        if tenant is not None:
            tenants.append(tenant)
            if tenant.state == "ready":
                self._leave(tenant)
            elif message.drain:
                tenant.to_retire = True
            else:
                self._cancel(tenant, PoolClosedError(f"{tenant.spec.name} was closed before it was loaded"))
        if not message.drain:
            for tenant in tenants:
                self._close_pool(tenant, drain=False)
        self._retirements.append((message.gone, tenants))

    def _answer_retirements(self) -> None:
        for retirement in list(self._retirements):
            gone, tenants = retirement
            if not any(tenant in self.leaving or self.table.get(tenant.key) is tenant for tenant in tenants):
                self._retirements.remove(retirement)
                gone.give(None)

    def _cancel(self, tenant: Tenant, error: BaseException) -> None:
        """It has not started yet, and is not to."""
        if tenant in self.line:
            self.line.remove(tenant)
        self._fail(tenant, error)

    def _close_all(self, drain: bool) -> None:
        for tenant in list(self.table.values()):
            if tenant.state == "ready":
                self._leave(tenant)
            else:
                self._cancel(tenant, PoolClosedError("the ModelPools are closed"))
        for tenant in self.leaving:
            self._close_pool(tenant, drain=drain)


def _fit(spec: ModelSpec, config: PoolConfig, limit: int) -> _Fitted:
    """What to start for a model: fewer workers than it would have by itself, if ``config`` does not say how many."""
    workers = len(make_plan(config, spec).seats)
    size = estimate_memory(spec, workers, config.start_method)
    if config.workers is None and config.isolation == "process":
        while workers > 1 and size > limit * SHARE_OF_ONE:
            workers -= 1
            size = estimate_memory(spec, workers, config.start_method)
            config = replace(config, workers=workers)
    return _Fitted(config, workers, size)


def _remeasure(tenant: Tenant) -> None:
    """Measure it, unless that was done a moment ago."""
    now = time.monotonic()
    if tenant.pool is not None and now - tenant.measured_at > MEASURE_SECONDS and (size := _measure(tenant.pool)):
        tenant.size = size
        tenant.measured_at = now


def _measure(pool: RerankerPool) -> int:
    """Bytes that the pool's workers take, pages that they share counted once; 0: none of them can be measured now."""
    seats = [worker for worker in pool.workers() if worker.state not in ("failed", "closed")]
    memory = pool.memory()
    measured = memory.workers
    if not measured:
        return 0
    taken = mapped = 0
    for worker in measured:
        if worker.pid == os.getpid():  # a thread: the process is the caller's
            taken += worker.weights_bytes
        elif worker.pss is not None:
            taken += worker.pss
        else:
            taken += worker.rss if worker.uss is None else worker.uss
            mapped = max(mapped, 0 if worker.uss is None else worker.mapped_bytes)
    templates = sum(template.pss or template.rss for template in memory.templates)
    workers = math.ceil(taken * max(len(seats), len(measured)) / len(measured))  # some may be starting anew
    return workers + mapped + templates


def _measured(snapshot: _Snapshot) -> ModelPoolsStats:
    """Its counts, with what the pools take now."""
    kept = list(snapshot.counts.models)
    for place, pool in enumerate(snapshot.pools):
        if pool is not None and (size := _measure(pool)):
            kept[place] = replace(kept[place], memory=size, measured=True)
    taken = sum(one.memory for one in kept if one.state not in ("planning", "waiting"))
    return replace(snapshot.counts, memory=taken, models=tuple(kept))


def _shown(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
