"""`shared_pool`: the process's one pool for a model and a device, for callers who do not know of each other.

Agents, retrievers and pipeline nodes are made in different places, and each asks for "its" reranker. If each had a pool
of its own, there would be many copies of the model in memory, and more workers than cores. So they ask here, and get
the same object.

What sharing means:

* One model with two activations is two models, each with a pool of its own: frameworks differ in whether they want
  logits or scores, and work side by side. Their requests do not share workers, so give them the same activation where
  either will do.
* The first caller decides the settings. A later caller gets the same pool if its settings agree: settings of the model
  (``ModelSpec``) must be equal, since they change scores; settings of the pool are compared only if the caller gives
  them. A disagreement is a ``ValueError`` that names the setting. To choose ``workers`` and the like, ask first.
* The queue is shared too. Requests take turns (weighted fair queueing), so one agent's thousand documents do not hold
  up another's ten. ``shared_pool(...).for_caller("a")`` shares the workers by callers first, however many requests each
  has. ``max_pending_pairs`` and ``overload`` bound all callers together, ``max_pending_pairs_per_caller`` each.
* Nobody owns it. ``close()``, and so ``with``, ends it for everyone who holds it; the next caller gets a new pool. So
  does the next caller after a pool that could not start. A pool that nobody closes ends with the interpreter.
* It belongs to this process. A forked child gets a pool of its own, and leaves its parent's alone. Pickled, it is
  unpickled as the shared pool of the process that unpickles it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from mp_rerank._planning.plan import make_plan
from mp_rerank._scheduling.dispatcher import Dispatcher
from mp_rerank.config import BUILTIN, ModelSpec, PoolConfig
from mp_rerank.model_pools import ModelPools
from mp_rerank.pool import RerankerPool

__all__ = ["shared_pool"]

# What is asked for: the process, the model (name, revision, loader and activation) and the devices. Two keys may lead
# to one pool: the devices as they are named, and as they turn out. A fork has another process number, and so finds none
# of its parent's pools; those stay referenced in it, and are left alone.
_Key = tuple[int, tuple[Any, ...], tuple[str, ...]]


def shared_pool(
    model: str | os.PathLike[str] | ModelSpec = BUILTIN,
    device: str | Sequence[str] | None = None,
    *,
    pools: ModelPools | None = None,
    **options: Any,
) -> RerankerPool:
    """The pool of this process for ``model`` on ``device``. The first caller makes it; all others get the same.

    It starts with its first request, as any pool does, or with ``start()``. May be called from any thread, signal
    handler or finalizer.

    Args:
        model: ``"builtin"``, a hub name, the path of a local folder, or a ``ModelSpec``. Name, revision, loader and
            activation say which model it is; the other fields are settings.
        device: a device (``torch.device`` will do), several of them, or ``None`` or ``"auto"``: every GPU, else the
            CPU. Devices are compared as they turn out: without a GPU, ``None`` and ``"cpu"`` share a pool.
        pools: where the pool is to come from, in place of this process's own shared ones: a bound on the memory of all
            its models. It is then as ``ModelPools.pool`` says, and a device and options are in place of those of
            ``pools``.
        options: the other keywords of ``RerankerPool``.

    Raises:
        ValueError: the shared pool has another value of a setting that is asked for; or as for ``RerankerPool``.
        TypeError: as for ``RerankerPool``.
    """
    if "devices" in options:
        raise TypeError("devices: shared_pool names them device, one or a sequence")
    if pools is not None:
        return pools.pool(model, **({} if device is None else {"devices": _names(device)}), **options)
    named = _names(device)
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)  # type: ignore[arg-type]  # a path becomes a str
    config = PoolConfig.of({**options, "devices": named})
    asked: _Key = (os.getpid(), _identity(spec), named)
    pool = _find(asked)
    if pool is None:
        spec.check_exists()
        plan = make_plan(PoolConfig(devices=named, tuned=False), spec)  # may take seconds: nvidia-smi
        turned_out = tuple(sorted({seat.device for seat in plan.seats}))
        key: _Key = (*asked[:2], turned_out)
        pool = _find(key) or _enter(key, _SharedPool(spec, devices=named, **options))
        _places[asked] = _places[key]
    _check_agrees(pool, spec, config, options)
    return pool


class _SharedPool(RerankerPool):
    """A pool that says when it is over, and is pickled as a call of ``shared_pool``."""

    def __init__(self, spec: ModelSpec, *, devices: Sequence[str], **options: Any) -> None:
        super().__init__(spec, devices=devices, **options)
        self._asked = partial(shared_pool, device=devices, **options)
        self._could_not_begin = False

    @property
    def is_over(self) -> bool:
        """Whether it is closed or could not start: the next caller of ``shared_pool`` gets a new pool."""
        dispatcher = self._dispatcher
        failed = dispatcher is not None and dispatcher.started.error is not None
        return self._closed or self._could_not_begin or failed

    def _begin(self) -> Dispatcher:
        try:
            return super()._begin()
        except Exception:  # such as in a process that may have no children
            self._could_not_begin = True
            raise

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._asked, (self.spec,)


# The registry. There is no lock: a signal handler or a finalizer may call shared_pool in the middle of another call, on
# the same thread, and would wait for itself. What has to be decided between threads is decided by dict.setdefault,
# which is one step: the first to set wins, and the pool of the other, which never started, is dropped.


class _Place:
    """A place for one pool. When that is over, another place follows it."""

    def __init__(self, pool: _SharedPool) -> None:
        self.pool = pool

    @property
    def follower(self) -> _Place | None:
        return vars(self).get("_follower")

    def followed_by(self, place: _Place) -> _Place:
        """The place that follows: ``place``, unless another thread has set one already."""
        found: _Place = vars(self).setdefault("_follower", place)
        return found


_places: dict[_Key, _Place] = {}


def _find(key: _Key) -> _SharedPool | None:
    """The pool that is shared for ``key``, if there is one."""
    place = _places.get(key)
    while place is not None and not _serves(place.pool, key):
        place = place.follower
    return None if place is None else place.pool


def _enter(key: _Key, pool: _SharedPool) -> _SharedPool:
    """Share ``pool`` for ``key``; the pool that is shared: it, or that of a thread that was faster."""
    place = _places.setdefault(key, _Place(pool))
    while not _serves(place.pool, key):
        place = place.followed_by(_Place(pool))
    # Forget the places before. A thread that stores an older place at the same time does no harm: this one follows it.
    _places[key] = place
    return place.pool


def _serves(pool: _SharedPool, key: _Key) -> bool:
    """Whether it has neither ended nor failed to start, and has not been reloaded with another model."""
    return not pool.is_over and _identity(pool.spec) == key[1]


def _identity(spec: ModelSpec) -> tuple[Any, ...]:
    """Which model it is: a local folder by its absolute path, which is the spec's own doing."""
    return (spec.name, spec.revision, spec.loader, spec.activation)


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
