"""A model that is kept, and the leases on it.

A request holds a *lease* on its pool, from before it is submitted until its future is done. On a pool that runs, it is
taken without the manager, and without a lock: whoever takes one first notes it and then looks whether the tenant is
``open``; the manager first shuts the tenant and then looks for leases. So one of the two sees the other, always. A
lease that is dropped, as by an exception between two steps, has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from typing import Any

from mp_rerank._scheduling.dispatcher import Dispatcher
from mp_rerank._scheduling.futures import Answer
from mp_rerank._scheduling.request import Request
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.pool import RerankerPool

__all__ = ["Acquire", "Key", "Lease", "Leased", "Tenant", "key_of"]

# The model with all its settings, and the pool's.
Key = tuple[Hashable, PoolConfig]


def key_of(spec: ModelSpec, config: PoolConfig) -> Key:
    """Equal for equal ones. (Their ``repr`` is another where it is interrupted by itself, as in a signal handler.)"""
    return tuple(_frozen(getattr(spec, item.name)) for item in fields(ModelSpec)), config


def _frozen(value: object) -> Hashable:
    """Something with a hash that is equal for equal values of equal types."""
    if isinstance(value, Mapping):
        return frozenset((key, _frozen(value[key])) for key in value)
    if isinstance(value, (list, tuple)):
        return type(value), tuple(_frozen(item) for item in value)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    return (type(value), value) if isinstance(value, Hashable) else repr(value)


class Tenant:
    """A model while it is kept, from the moment it is asked for until its workers have ended.

    Args:
        on_left: told, on whichever thread a lease ends, that it has, once the tenant is shut.

    Attributes:
        state: ``planning``, ``waiting`` (for room), ``starting``, ``ready``, or ``leaving``.
        open: whether leases may be taken without the manager.
        leases: the leases on it, by identity.
        waiters: those who wait for a lease.
        to_retire: whether it is to be retired once it has started and done what it was started for.
        workers: how many, once they are planned.
        size: bytes; estimated, or as last measured, at ``measured_at``.
        used: when it was used last, on the monotonic clock.
    """

    def __init__(self, key: Key, spec: ModelSpec, config: PoolConfig, on_left: Callable[[Tenant], None]) -> None:
        self.key = key
        self.spec = spec
        self.config = config
        self.state = "planning"
        self.open = False
        self.leases: dict[int, None] = {}
        self.waiters: list[Acquire] = []
        self.to_retire = False
        self.workers = 0
        self.size = 0
        self.measured_at = -math.inf
        self.used = time.monotonic()
        self.closing = False
        self.pool: RerankerPool | None = None
        self._on_left = on_left

    @property
    def dispatcher(self) -> Dispatcher | None:
        return None if self.pool is None else self.pool._dispatcher

    @property
    def broken(self) -> bool:
        """Whether it has started, and scores nothing any more."""
        dispatcher = self.dispatcher
        return self.state == "ready" and (dispatcher is None or dispatcher.broken)

    def enter(self) -> Lease | None:
        """A lease, unless it is shut."""
        lease = Lease(self)  # first, and then the look: see the top of this module
        if self.open and not self.broken:
            return lease
        lease.end()
        return None

    def left(self) -> None:
        """One lease less."""
        self.used = time.monotonic()
        if not self.open:
            self._on_left(self)


class Lease:
    """Keeps a tenant from being retired until it is ended, or dropped: an exception that ends a call drops it."""

    __slots__ = ("tenant",)

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        tenant.leases[id(self)] = None

    def end(self) -> None:
        """Let go; again: nothing."""
        tenant = getattr(self, "tenant", None)  # none, if Ctrl-C came as this was made
        if tenant is not None and tenant.leases.pop(id(self), self) is None:
            tenant.left()

    __del__ = end


class Acquire:
    """Somebody needs a model."""

    def __init__(self, key: Key, spec: ModelSpec, config: PoolConfig) -> None:
        self.key = key
        self.spec = spec
        self.config = config
        self.answer: Answer[Lease] = Answer()
        self.abandoned = False


class Leased:
    """What one request sees of its pool's dispatcher. The lease ends with the request's future."""

    def __init__(self, started: Answer[Lease], asked: Acquire | None = None) -> None:
        self.started = started
        self._asked = asked

    def __getattr__(self, name: str) -> Any:
        """Whatever else a dispatcher has, once there is a lease."""
        return getattr(self._dispatcher, name)

    @property
    def _dispatcher(self) -> Dispatcher:
        dispatcher = self.started.get().tenant.dispatcher
        assert dispatcher is not None
        return dispatcher

    def submit(self, request: Request, *, wait: bool) -> None:
        """As a dispatcher's. If it raises, the caller cancels the future, which ends the lease."""
        lease = self.started.get()
        request.future.add_internal_callback(lambda future: lease.end())
        self._dispatcher.submit(request, wait=wait)

    def give_up(self) -> None:
        """Nobody needs the lease, whether or not it is there by now."""
        if self._asked is not None:
            self._asked.abandoned = True
        if self.started.given and self.started.error is None:
            self.started.get().end()

    def close(self, *, drain: bool) -> None:
        """As a dispatcher's, for a start that fails or is interrupted: this caller leaves."""
        self.give_up()

    def join(self, timeout: float | None = None) -> bool:
        """As a dispatcher's: there is nothing to wait for."""
        return True
