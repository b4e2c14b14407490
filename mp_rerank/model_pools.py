"""`ModelPools`: several models within one bound on memory, each in a pool that is started and retired on demand.

    pools = ModelPools(memory="8GiB")
    reranker = pools.pool("cross-encoder/ms-marco-MiniLM-L6-v2")    # starts nothing; may be kept for ever
    reranker.rerank("how do birds fly?", documents)                 # starts the model's pool, unless it runs

What `ModelPools.pool` returns is a ``RerankerPool`` to its callers. Behind it is one pool a model, while it is kept.

* Whoever needs a model first has its pool started. However many ask meanwhile, it is loaded once.
* If the bound leaves no room, pools are retired: those with nothing to do, the one first that was used longest ago. If
  that is not enough, those that work take no new requests, finish those they have, and are then retired. So a model
  that waits for room gets it, however busy the others are. Models wait in the order in which they were asked for.
* No request fails because its pool is being retired: it waits until its model is loaded again.
* A model that the bound cannot hold by itself is a ``ModelLoadError`` that says so.
"""

from __future__ import annotations

import asyncio
import copy
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, SupportsIndex

from mp_rerank._calls import Asked
from mp_rerank._checks import check_flag, check_seconds, memory_size
from mp_rerank._model_manager import Manager, Retire
from mp_rerank._scheduling.dispatcher import Dispatcher
from mp_rerank._scheduling.futures import Answer, PoolFuture, is_pool_thread
from mp_rerank._scheduling.request import Request
from mp_rerank._scheduling.streams import Feed
from mp_rerank._tenants import Acquire, Lease, Leased, key_of
from mp_rerank._within import within
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.errors import PoolClosedError, RequestTimeoutError, RerankError
from mp_rerank.pool import RerankerPool, given, spec_of
from mp_rerank.results import ModelPoolsStats

__all__ = ["ModelPools"]


class ModelPools:
    """Pools by model, within a bound on the memory of all their workers. For any number of threads.

    Args:
        memory: the bound: bytes, or a size such as ``"8GiB"`` (2**30 each) or ``"512MB"`` (10**6). A pool that runs
            counts with what its workers are measured to take (pages that several share are counted once), whenever
            another is to be started; one that is to be started with an estimate by the size of its weights. Memory of
            GPUs does not count.
        devices: as for ``RerankerPool``.
        options: other keywords of ``RerankerPool``, for every pool. Without ``workers``, a pool has as many as it would
            have by itself, but no more than take half of ``memory``, and at least one.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(self, memory: int | str, *, devices: str | Sequence[str] = "auto", **options: Any) -> None:
        self._options: dict[str, Any] = {"devices": devices, **options}
        self._config = PoolConfig.of(self._options)
        _check_here(self._config)
        self._manager = Manager(memory_size("memory", memory))
        weakref.finalize(self, self._manager.close, drain=True).atexit = False

    def __repr__(self) -> str:
        states = [f"{tenant.spec.name}: {tenant.state}" for tenant in list(self._manager.table.values())]
        return f"<ModelPools: {', '.join(states) or 'nothing is loaded'}>"

    def pool(self, model: str | os.PathLike[str] | ModelSpec, **options: Any) -> RerankerPool:
        """The pool of ``model``, to be used like any other; starts nothing.

        It is for any number of threads, and stays good while its own pool is retired and started again: each call
        starts what it needs, and waits for it, up to its ``timeout``. ``start()`` loads the model beforehand.
        ``close()`` and ``with`` retire it, once its requests are done; the next call loads it again. ``stats()`` and
        ``workers()`` are those of the workers of the moment: there are none while the model is not loaded. ``reload``
        takes the same model only: its files may have changed.

        Args:
            model: a name, a path or a ``ModelSpec``. Equal specs have one pool; any other field makes another model.
            options: other keywords of ``RerankerPool``, in place of those given to ``ModelPools``. Models with other
                options have other pools.

        Raises:
            TypeError, ValueError: as for ``RerankerPool``.
        """
        return _Handle(self, self._manager, spec_of(model), {**self._options, **options})

    def stats(self) -> ModelPoolsStats:
        """Which models are kept, and what they take."""
        return self._manager.stats()

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end all pools, and wait until they are gone. Does nothing on closed ones.

        Args:
            drain: finish what is pending first; otherwise it fails with ``PoolClosedError``. What waits for its model
                to be loaded fails in any case.
            timeout: seconds to drain for, after which what is left fails as with ``drain=False``; ``None``: no limit.
        """
        manager = self._manager
        if os.getpid() == manager.owner:
            _wait_for_end(manager.ended, manager.close, drain, timeout)

    def __enter__(self) -> ModelPools:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(drain=kind is None)

    def __copy__(self) -> ModelPools:
        return self

    def __deepcopy__(self, memo: object) -> ModelPools:
        """Themselves: frameworks copy what holds them, and their workers are there once."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError(
            "ModelPools cannot be pickled: their workers belong to this process. Make them in the other one"
        )


class _Handle(RerankerPool):
    """What callers hold of a model: a pool of which each request finds its own dispatcher."""

    def __init__(self, pools: ModelPools, manager: Manager, spec: ModelSpec, options: dict[str, Any]) -> None:
        super().__init__(spec, **options)
        _check_here(self.config)
        self._pools = pools  # they end with the last who holds them, or a handle
        self._manager = manager
        self._key = key_of(spec, self.config)

    def __repr__(self) -> str:
        tenant = self._manager.table.get(self._key)
        return f"<RerankerPool {self.spec.name!r} of ModelPools: {'not loaded' if tenant is None else tenant.state}>"

    @property
    def _dispatcher(self) -> Dispatcher | None:  # type: ignore[override]  # nobody sets it
        """The present one, to look into."""
        tenant = self._manager.table.get(self._key)
        return None if tenant is None else tenant.dispatcher

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Retire the model's pool, and wait until it is gone; the next call loads the model again."""
        manager = self._manager
        if os.getpid() != manager.owner:
            return
        gone: Answer[None] = Answer()

        def retire(*, drain: bool) -> None:
            manager.put(Retire(self._key, drain, gone))

        if manager.begun:
            _wait_for_end(gone, retire, drain, timeout)

    def reload(self, model: str | os.PathLike[str] | ModelSpec) -> None:
        """Load the same model anew, as its files are now, without a pause; see ``RerankerPool.reload``.

        It is in memory twice meanwhile, whatever the bound. Another model is refused: ask ``ModelPools`` for it.
        """
        if spec_of(model) != self.spec:
            raise RerankError("a pool of ModelPools keeps its model: ask pools.pool(...) for the other one")
        if self._dispatcher is None:
            self.start()
            return
        leased = self._lease(None)
        try:
            leased.reload(self.spec).get()
        finally:
            leased.give_up()

    # What a request goes through. `_begin` and `_running` return a `Leased` in place of a dispatcher.

    def _check_open(self) -> None:
        if os.getpid() != self._manager.owner:
            raise PoolClosedError(
                f"these pools belong to process {self._manager.owner}; a fork of it needs ModelPools of its own"
            )
        if self._manager.closed:
            raise PoolClosedError("the ModelPools are closed")

    def _begin(self) -> Any:
        self._check_open()
        tenant = self._manager.table.get(self._key)
        lease = None if tenant is None else tenant.enter()
        if lease is None:
            asked = Acquire(self._key, self.spec, self.config)
            self._manager.begin()
            self._manager.put(asked)
            return Leased(asked.answer, asked)
        answer: Answer[Lease] = Answer()
        answer.give(lease)
        return Leased(answer)

    def _running(self) -> Any:
        return self._lease(None)

    def start(self) -> RerankerPool:
        """Load the model, unless it is loaded, and wait until it is; errors as of ``RerankerPool.start``."""
        self._lease(None).give_up()
        return self

    def _lease(self, asked: Asked | None) -> Leased:
        """Wait for a lease, until the request expires."""
        leased: Leased = self._begin()
        try:
            leased.started.wait(None if asked is None or asked.deadline is None else _seconds_left(asked.deadline))
            self._check_leased(leased, asked)
        except BaseException:
            leased.give_up()
            raise
        return leased

    def _check_leased(self, leased: Leased, asked: Asked | None) -> None:
        if asked is not None and not leased.started.given:
            timeout = asked.options.timeout or 0.0
            words = f"the request waited {timeout:g} s for {self.spec.name} to be loaded"
            raise RequestTimeoutError(words, timeout=timeout, total=len(asked.pairs))
        if leased.started.error is not None:
            raise copy.copy(leased.started.error)

    def _submit(self, asked: Asked) -> Future[Any]:
        try:
            leased: Any = self._lease(asked)
        except RequestTimeoutError as error:
            return _unscored(asked, error)
        return self._enter(leased, self._request(asked, leased), wait=True)

    def _result(self, asked: Asked) -> Any:
        try:
            leased: Any = self._lease(asked)
        except RequestTimeoutError as error:
            return _unscored(asked, error).result()
        request = self._request(asked, leased)
        try:
            return self._enter(leased, request, wait=True).result()
        finally:
            request.future.cancel()  # of a finished one: nothing

    async def _entered(self, asked: Asked) -> PoolFuture:
        leased = self._begin()
        try:
            limit = None if asked.deadline is None else _seconds_left(asked.deadline)
            try:
                await within(limit, given(leased.started))
            except asyncio.TimeoutError:  # another than the built-in one before Python 3.11
                pass
            self._check_leased(leased, asked)
            return self._enter(leased, self._request(asked, leased), wait=False)
        except RequestTimeoutError as error:
            leased.give_up()
            return _unscored(asked, error)
        except BaseException:
            leased.give_up()
            raise

    def _request(self, asked: Asked, dispatcher: Any, feed: Feed | None = None) -> Request:
        try:
            return super()._request(asked, dispatcher, feed)
        except BaseException:
            dispatcher.give_up()  # now: whoever keeps the exception keeps this frame too
            raise


def _unscored(asked: Asked, error: RequestTimeoutError) -> PoolFuture:
    """The future of a request that expired before there was a pool for it, if it is a partial one; else ``error``."""
    if asked.options.on_timeout != "partial":
        raise error
    request = Request(asked.pairs, [0] * len(asked.pairs), asked.finish, partial=True)
    request.resolve()
    return request.future


def _seconds_left(deadline: float) -> float:
    return max(0.0, deadline - time.monotonic())


def _wait_for_end(ended: Answer[None], close: Callable[..., None], drain: bool, timeout: float | None) -> None:
    """Close, and wait until that is done, where a thread may wait."""
    check_flag("drain", drain)
    if timeout is not None:
        timeout = check_seconds("timeout", timeout)
    close(drain=drain)
    if is_pool_thread():
        return
    try:
        ended.wait(timeout)
        if not ended.given:
            close(drain=False)
            ended.wait()
    except BaseException:  # Ctrl-C while draining
        close(drain=False)
        ended.wait()
        raise


def _check_here(config: PoolConfig) -> None:
    """Raise ``ValueError`` for pools whose memory is not this machine's."""
    if config.cluster is not None:
        raise ValueError(
            "cluster: ModelPools keep models within a bound on this machine's memory, which says nothing of a "
            "cluster's: use a RerankerPool for each model"
        )
