"""`shared_pool`: the process's one pool for a model and a device, for callers who do not know of each other.

Agents, retrievers and nodes of a pipeline are made far apart, and each asks for "its" reranker. A pool each would be a
model times the number of workers in memory for every one of them, and more workers than cores. So they ask here, and
get the same object.

What sharing means:

* Whoever asks first decides the settings. Later callers get that pool if what they ask for agrees with it. Settings of
  the pool that they do not mention are left to the first; settings of the model (``ModelSpec``) must agree, since they
  change scores. A disagreement is a ``ValueError`` that names the setting. To set ``workers`` and the like, ask early.
* The queue is shared too. Requests take turns (see ``batching``), so one agent's thousand documents do not hold up
  another's ten; ``max_pending_pairs`` and ``overload`` bound all callers together.
* Nobody owns it: ``close()``, and therefore ``with``, ends it for everyone who holds it. The next to ask gets a fresh
  one. Left alone, it ends with the interpreter.
* It belongs to this process. A forked child that asks gets a pool of its own, and should not use its parent's; a child
  that was spawned has nothing to inherit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from mp_rerank._planning.plan import make_plan
from mp_rerank.config import BUILTIN, ModelSpec, PoolConfig
from mp_rerank.pool import RerankerPool

__all__ = ["shared_pool"]

# What is asked for: process, model (name, revision, loader) and devices, as named or as they turned out to be. The
# process is part of it so that a fork finds nothing, and so that what it inherited stays referenced and is left alone.
_Key = tuple[int, tuple[Any, ...], tuple[str, ...]]

_pools: dict[_Key, RerankerPool] = {}
_lock = threading.Lock()


def shared_pool(
    model: str | ModelSpec = BUILTIN, device: str | Sequence[str] | None = None, **options: Any
) -> RerankerPool:
    """The pool of this process for ``model`` on ``device``: made by the first to ask, and given to all the others.

    It starts with its first request, as any pool does, or with ``start()``.

    Args:
        model: ``"builtin"``, a hub name, the path of a local folder, or a ``ModelSpec``. Name, revision and loader say
            which model it is; the other fields are settings.
        device: a device (``torch.device`` will do), several of them, or ``None`` or ``"auto"``: every GPU, else the
            CPU. Devices are compared as they turn out: without a GPU, ``None`` and ``"cpu"`` share a pool.
        options: the other keywords of ``RerankerPool``.

    Raises:
        ValueError: the pool that is shared has another value of a setting asked for; or as for ``RerankerPool``.
        TypeError: as for ``RerankerPool``.
    """
    if "devices" in options:
        raise TypeError("devices: shared_pool names them device, one or a sequence")
    named = _names(device)
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
    config = PoolConfig.of({**options, "devices": named})
    asked: _Key = (os.getpid(), _identity(spec), named)
    with _lock:
        pool = _found(asked)
        if pool is None:
            plan = make_plan(PoolConfig(devices=named, tuned=False), spec)
            turned_out = tuple(sorted({seat.device for seat in plan.seats}))
            key: _Key = (*asked[:2], turned_out)
            pool = _found(key)
            if pool is None:
                pool = _pools[key] = RerankerPool(spec, devices=named, **options)
            _pools[asked] = pool
    _check_agrees(pool, spec, config, options)
    return pool


def _found(key: _Key) -> RerankerPool | None:
    pool = _pools.get(key)
    return None if pool is None or _is_over(pool) or _identity(pool.spec) != key[1] else pool


def _is_over(pool: RerankerPool) -> bool:
    """Whether it is closed, or could not start: then it never will, and the next caller may have more luck."""
    dispatcher = pool._dispatcher
    failed = dispatcher is not None and dispatcher.started.error is not None
    return pool._closed or failed


def _identity(spec: ModelSpec) -> tuple[Any, ...]:
    return (spec.name, spec.revision, spec.loader)


def _names(device: object) -> tuple[str, ...]:
    """The device or devices by name, in an order that does not matter."""
    if device is None:
        return ("auto",)
    if isinstance(device, Sequence) and not isinstance(device, str):
        return tuple(sorted(str(one) for one in device))
    return (str(device),)


def _check_agrees(pool: RerankerPool, spec: ModelSpec, config: PoolConfig, options: dict[str, Any]) -> None:
    settings = [(item.name, getattr(pool.spec, item.name), getattr(spec, item.name)) for item in fields(ModelSpec)]
    settings += [(name, getattr(pool.config, name), getattr(config, name)) for name in options]
    for name, has, wanted in settings:
        if has != wanted:
            raise ValueError(
                f"{name}: the pool that this process shares for {spec.name!r} on {', '.join(pool.config.devices)} "
                f"has {has!r}, and {wanted!r} is asked for; agree on one, or make a RerankerPool of your own"
            )


def _forget_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):  # another thread may hold it at the moment of a fork, and is not there to let go
    os.register_at_fork(after_in_child=_forget_lock)
