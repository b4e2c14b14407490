"""`RerankerPool`: what callers hold. It checks what they pass, and hands requests to the dispatcher."""

from __future__ import annotations

import asyncio
import copy
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, SupportsIndex

from mp_rerank._arguments import check_caller
from mp_rerank._calls import Asked, RerankerCalls
from mp_rerank._checks import check_flag, check_seconds, is_for_ever
from mp_rerank._pairs import digests
from mp_rerank._planning.checkpoint import check_backend, check_hub_cache
from mp_rerank._planning.plan import Plan, make_plan
from mp_rerank._scheduling.dispatcher import Dispatcher, leave_with_interpreter
from mp_rerank._scheduling.futures import (
    Answer,
    PoolFuture,
    RequestTimes,
    check_may_wait,
    is_pool_thread,
    result_of,
)
from mp_rerank._scheduling.request import DEFAULT_CALLER, Request, estimate_lengths, misfit
from mp_rerank._scheduling.streams import AsyncScoreStream, Feed, ScoreStream
from mp_rerank._workers.handle import check_may_start
from mp_rerank._workers.logs import flush
from mp_rerank._workers.memory import memory_of
from mp_rerank.config import BUILTIN, ModelSpec, PoolConfig
from mp_rerank.errors import PoolClosedError
from mp_rerank.results import PoolMemory, PoolStats, WorkerInfo

__all__ = ["RerankerPool"]

# How long `close` waits for log handlers of the caller's.
LOG_SECONDS = 1.0


class RerankerPool(RerankerCalls):
    """A pool of workers, each with its own model on its own device, for any number of threads.

        with RerankerPool("cross-encoder/ms-marco-MiniLM-L6-v2") as pool:
            future = pool.submit("how do birds fly?", documents, top_n=5)
            for result in future.result():
                print(result.relevance_score, result.document)

    Workers start with ``start()``, on entering ``with``, or with the first request. They end with ``close()``, on
    leaving ``with``, when the pool is garbage-collected, when the interpreter exits, and when this process is killed.
    Every method may be called from any thread.

    Args:
        model: ``"builtin"``, a hub name, the path of a local folder, or a ``ModelSpec``.
        devices: ``"auto"``, a device, or a list of them; see ``PoolConfig``, whose every field is a keyword here.
        workers: workers in all; ``None``: what was tuned, else one a GPU, or what the cores and the memory allow.
        threads_per_worker: compute threads of each; ``None``: what was tuned, else the cores are shared out.
        options: the other fields of ``PoolConfig``, such as ``cluster``: seats in a Dask cluster.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | ModelSpec = BUILTIN,
        *,
        devices: str | Sequence[str] = "auto",
        workers: int | None = None,
        threads_per_worker: int | None = None,
        **options: Any,
    ) -> None:
        self.spec = spec_of(model)
        options.update(devices=devices, workers=workers, threads_per_worker=threads_per_worker)
        self.config = PoolConfig.of(options)
        self.config.check_model(self.spec)
        self._owner = os.getpid()
        self._closed = False

    # The first to start the pool makes it, in one step of the interpreter: see `_begin`.
    _dispatcher: Dispatcher | None = None

    # Whose requests are that name no caller.
    _caller = DEFAULT_CALLER

    def __repr__(self) -> str:
        dispatcher = self._dispatcher
        state = "closed" if self._closed else "not started" if dispatcher is None else repr(dispatcher)
        return f"<RerankerPool {self.spec.name!r}: {state}>"

    # Life.

    def start(self) -> RerankerPool:
        """Start the workers and wait until each has loaded and proved its model. Does nothing on a started pool.

        Raises:
            ModelLoadError: a worker could not load the model, naming model, device and cause.
            WorkerCrashedError: a worker died again and again while it was loading.
            PoolClosedError: the pool is closed.
            ValueError: a device was named that this machine plainly lacks.
            RuntimeError: no process may be started here: see ``check_may_start``.
        """
        dispatcher = self._begin()
        if not dispatcher.started.given:
            check_may_wait()
        try:
            dispatcher.started.wait()
        except BaseException:  # Ctrl-C
            dispatcher.close(drain=False)
            dispatcher.join()  # it may be launching workers, which an interpreter that exits lets nobody do
            raise
        self._check_started(dispatcher)
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end the workers, and wait until they are gone. Does nothing on a closed pool.

        On a thread that belongs to a pool or an executor (in a finalizer, say) it does not wait: that thread may be
        what the workers wait for.

        Args:
            drain: finish what is pending first; otherwise it fails with ``PoolClosedError`` and workers are killed.
            timeout: seconds to drain for, after which what is left fails as with ``drain=False``; ``None``: no limit.

        Raises:
            TypeError, ValueError: naming the argument and its value; nothing is closed then.
        """
        check_flag("drain", drain)
        if timeout is not None:
            timeout = check_seconds("timeout", timeout)
            timeout = None if is_for_ever(timeout) else timeout
        if os.getpid() != self._owner:
            return
        self._closed = True
        dispatcher = self._dispatcher
        if dispatcher is None:
            return
        dispatcher.close(drain=drain)
        try:
            if not dispatcher.join(timeout):
                dispatcher.close(drain=False)
                dispatcher.join()
        except BaseException:  # Ctrl-C while draining
            dispatcher.close(drain=False)
            dispatcher.join()
            raise
        if not is_pool_thread():
            flush(LOG_SECONDS)

    def __enter__(self) -> RerankerPool:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(drain=kind is None)

    def reload(self, model: str | os.PathLike[str] | ModelSpec) -> None:
        """Replace the model without a pause: load it in new workers, switch to them, let the old ones finish and leave.

        Returns once new requests go to the new model. A request is scored wholly by one of the two. Until the old
        workers have left, both models are in memory.

        Args:
            model: as for the pool itself.

        Raises:
            ModelLoadError: it could not be loaded; the pool goes on with the old one.
            RerankError: another reload is under way.
        """
        spec = spec_of(model)
        self.config.check_model(spec)
        dispatcher = self._running()
        dispatcher.reload(spec).get()
        self.spec = spec

    # Callers.

    def for_caller(self, caller: str) -> RerankerPool:
        """A handle of this pool whose requests are ``caller``'s, unless they name another.

        Callers share the workers equally while they wait, however many requests each has, and each is counted by
        itself in ``stats().callers``. Handles of one name are one caller; a pool's own requests are those of the caller
        ``"default"``.

        The handle has every method of the pool, and does not own it. To ``close()`` the handle, or to leave its
        ``with``, is to submit nothing more through it: the pool goes on, and so does what is pending. A pool that is
        closed is closed for all handles. A handle keeps its pool from being garbage-collected.

        Raises:
            TypeError, ValueError: ``caller`` is no string, or empty.
        """
        return _CallerHandle(self, check_caller(caller))

    # Looking in.

    def stats(self) -> PoolStats:
        """Counters since the start, and what is pending; zeros before the start, the last state after the close."""
        dispatcher = self._dispatcher
        return PoolStats() if dispatcher is None else dispatcher.stats()

    def workers(self) -> list[WorkerInfo]:
        """Each seat, the worker in it, and how the one before it ended; none before the start."""
        dispatcher = self._dispatcher
        return [] if dispatcher is None else dispatcher.workers()

    def memory(self) -> PoolMemory:
        """RSS, USS and PSS of the parent and of each worker now alive, and the size of each worker's weights; in bytes.

        Beside them that of the templates, under ``start_method="fork-model"``.
        """
        workers = [
            memory_of(info.pid, info.weights_bytes, info.mapped_bytes)
            for info in self.workers()
            if info.pid is not None
        ]
        parent = memory_of(os.getpid())
        assert parent is not None
        templates = [] if self._dispatcher is None else map(memory_of, self._dispatcher.template_pids())
        return PoolMemory(
            parent,
            tuple(worker for worker in workers if worker is not None),
            tuple(template for template in templates if template is not None),
        )

    @property
    def plan(self) -> Plan:
        """The seats, and why there are so many."""
        dispatcher = self._dispatcher
        return (dispatcher and dispatcher.plan) or make_plan(self.config, self.spec)

    # Within.

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise PoolClosedError(f"this pool belongs to process {self._owner}; a fork of it needs a pool of its own")
        if self._closed:
            raise PoolClosedError("the pool is closed")

    def _begin(self) -> Dispatcher:
        """The dispatcher, which starts the workers: made and begun by the first to come here.

        Holds no lock: a signal handler may come here while the thread that it interrupts is here too.
        """
        self._check_open()
        dispatcher = self._dispatcher
        if dispatcher is None:
            check_may_start(self.config)
            check_hub_cache(self.spec)
            check_backend(self.spec)
            made = Dispatcher(self.spec, self.config)
            leave_with_interpreter(made)
            dispatcher = vars(self).setdefault("_dispatcher", made)
            if dispatcher is made:
                weakref.finalize(self, made.close, drain=True).atexit = False
            self._check_open()  # `close` sets its mark first and then looks for a dispatcher
        try:
            dispatcher.begin()
        except BaseException:  # no thread to be had, or Ctrl-C: the next to come here may have more luck
            vars(self).pop("_dispatcher", None)
            dispatcher.close(drain=False)
            dispatcher.join()
            raise
        return dispatcher

    def _check_started(self, dispatcher: Dispatcher) -> None:
        """Raise the error that kept the workers from starting, if there is one."""
        error = dispatcher.started.error
        if error is not None:
            dispatcher.close(drain=False)
            dispatcher.join()
            raise copy.copy(error)  # one for each call: raising an error adds to its traceback

    def _running(self) -> Dispatcher:
        self._check_open()
        dispatcher = self._dispatcher
        if dispatcher is None or dispatcher.facts is None:
            self.start()
            dispatcher = self._dispatcher
            assert dispatcher is not None
        return dispatcher

    def _submit(self, asked: Asked) -> Future[Any]:
        """Hand a request over, once there is room for it; its future."""
        dispatcher = self._running()
        return self._enter(dispatcher, self._request(asked, dispatcher), wait=True)

    def _result(self, asked: Asked) -> Any:
        """Hand a request over and wait for its result. Interrupted, cancel it."""
        dispatcher = self._running()
        request = self._request(asked, dispatcher)
        try:
            return self._enter(dispatcher, request, wait=True).result()
        finally:
            request.future.cancel()  # of a finished one: nothing

    async def _awaited(self, asked: Asked) -> Any:
        """Hand a request over and wait for its result, on no thread. Cancelled, cancel it."""
        return await result_of(await self._entered(asked))

    async def _entered(self, asked: Asked) -> PoolFuture:
        """Hand a request over as soon as there is a model for it, waiting on no thread; its future."""
        dispatcher = await self._ready()
        return self._enter(dispatcher, self._request(asked, dispatcher), wait=False)

    async def _ready(self) -> Dispatcher:
        """The dispatcher, once the workers have started; waited for on no thread."""
        dispatcher = self._begin()
        await given(dispatcher.started)
        if dispatcher.started.error is not None:
            dispatcher.close(drain=False)
            raise copy.copy(dispatcher.started.error)
        return dispatcher

    def _stream(self, asked: Asked) -> ScoreStream:
        dispatcher = self._running()
        feed = Feed()
        stream = ScoreStream(feed)
        try:
            request = self._request(asked, dispatcher, feed)
            stream.follow(request.future)
            self._enter(dispatcher, request, wait=True)
        except BaseException:
            stream.close()
            raise
        return stream

    def _astream(self, asked: Asked) -> AsyncScoreStream:
        feed = Feed()

        async def enter() -> Future[Any]:
            dispatcher = await self._ready()
            return self._enter(dispatcher, self._request(asked, dispatcher, feed), wait=False)

        return AsyncScoreStream(feed, enter)

    def _request(self, asked: Asked, dispatcher: Dispatcher, feed: Feed | None = None) -> Request:
        facts = dispatcher.facts
        assert facts is not None
        options = asked.options
        pair_options = options.pair_options(facts.prompts)
        why = misfit(facts, pair_options, ranking=asked.ranking)
        if why is not None:
            raise ValueError(f"{self.spec.name} {why}")
        request = Request(
            asked.pairs,
            estimate_lengths(asked.pairs, facts.max_length, pair_options),
            asked.finish,
            options=pair_options,
            keys=digests(asked.pairs, pair_options) if self.config.score_cache else None,
            caller=options.caller or self._caller,
            priority=options.priority,
            deadline=asked.deadline,
            timeout=options.timeout,
            partial=options.on_timeout == "partial",
            num_labels=facts.num_labels,
            ranking=asked.ranking,
            on_scores=None if feed is None else feed.put,
        )
        if feed is not None:
            request.future.add_internal_callback(feed.end)
        return request

    def _enter(self, dispatcher: Dispatcher, request: Request, *, wait: bool) -> PoolFuture:
        """Hand ``request`` over, or resolve it here; its future."""
        if not request.pairs:
            request.resolve()
            return request.future
        try:
            dispatcher.submit(request, wait=wait)
        except BaseException:  # Ctrl-C: nobody has the future
            request.future.cancel()
            raise
        return request.future

    # Copies.

    def __copy__(self) -> RerankerPool:
        return self

    def __deepcopy__(self, memo: object) -> RerankerPool:
        """The pool itself: frameworks copy what holds it, and its workers are there once."""
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        raise TypeError(
            "a RerankerPool cannot be pickled: its workers belong to this process. Pickle pool.spec, and make a pool "
            "of it in the other process; or use mp_rerank.shared_pool(...): it is unpickled as the shared pool there"
        )


class _CallerHandle(RerankerPool):
    """Another's pool, with a caller of its own: see ``RerankerPool.for_caller``."""

    def __init__(self, pool: RerankerPool, caller: str) -> None:
        self.config = pool.config
        self._pool = pool
        self._caller = caller
        self._closed = False

    def __repr__(self) -> str:
        return f"<caller {self._caller!r} of {self._pool!r}>"

    @property
    def spec(self) -> ModelSpec:  # type: ignore[override]
        """The pool's model now."""
        return self._pool.spec

    @property
    def _dispatcher(self) -> Dispatcher | None:  # type: ignore[override]
        return self._pool._dispatcher

    def start(self) -> RerankerPool:
        """As ``RerankerPool.start``."""
        self._check_open()
        self._pool.start()
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Submit nothing more through this handle. The pool goes on, and what is pending too, whatever is asked for."""
        self._closed = True

    def reload(self, model: str | os.PathLike[str] | ModelSpec) -> None:
        """As ``RerankerPool.reload``, for all callers."""
        self._check_open()
        self._pool.reload(model)

    def for_caller(self, caller: str) -> RerankerPool:
        """As ``RerankerPool.for_caller``."""
        return self._pool.for_caller(caller)

    def _check_open(self) -> None:
        if self._closed:
            raise PoolClosedError(f"this handle of the pool, for caller {self._caller!r}, is closed")
        self._pool._check_open()

    def _begin(self) -> Dispatcher:
        self._check_open()
        return self._pool._begin()

    def _running(self) -> Dispatcher:
        self._check_open()
        return self._pool._running()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return RerankerPool.for_caller, (self._pool, self._caller)


def spec_of(model: str | os.PathLike[str] | ModelSpec) -> ModelSpec:
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)  # type: ignore[arg-type]  # a path becomes a str
    spec.check_exists()
    return spec


async def scored_in(pool: RerankerPool, asked: Asked) -> tuple[Any, RequestTimes | None]:
    """For a server: what comes of ``asked``, as from the calls for asyncio, and how long that took."""
    future = await pool._entered(asked)
    return await result_of(future), future.times


async def given(answer: Answer[None]) -> None:
    """Wait until ``answer`` is given, a value or an error, on no thread."""
    loop = asyncio.get_running_loop()
    given = asyncio.Event()

    def wake() -> None:
        try:
            loop.call_soon_threadsafe(given.set)
        except RuntimeError:  # the loop has been closed meanwhile
            pass

    answer.on_given(wake)
    await given.wait()
