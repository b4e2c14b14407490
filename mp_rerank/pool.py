"""`RerankerPool`: what callers hold. It validates, admits, and hands requests to the dispatcher."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, SupportsIndex, cast

import numpy as np
import numpy.typing as npt
import psutil

from mp_rerank._arguments import (
    OnTimeout,
    check_on_timeout,
    check_predict_options,
    check_priority,
    check_top_n,
    deadline_of,
    documents_of,
    pairs_of,
    shown,
    text_of,
)
from mp_rerank._pairs import Pair, digests, estimate_pair, estimate_text
from mp_rerank._planning.plan import Plan, make_plan
from mp_rerank._scheduling.dispatcher import Dispatcher
from mp_rerank._scheduling.request import Request
from mp_rerank._workers.handle import check_may_start
from mp_rerank.config import BUILTIN, ModelSpec, PoolConfig
from mp_rerank.errors import PoolClosedError, RequestTimeoutError
from mp_rerank.results import PoolMemory, PoolStats, RerankResult, Scores, WorkerInfo, WorkerMemory

__all__ = ["RerankerPool"]


class RerankerPool:
    """A pool of workers, each with its own model on its own device, for any number of threads.

        with RerankerPool("cross-encoder/ms-marco-MiniLM-L6-v2") as pool:
            future = pool.submit("how do birds fly?", documents, top_n=5)
            for result in future.result():
                print(result.relevance_score, result.document)

    Workers start with ``start()``, on entering ``with``, or with the first request. They end with ``close()``, on
    leaving ``with``, when the pool is garbage-collected, when the interpreter exits, and when this process dies of
    whatever. Every method may be called from any thread.

    Args:
        model: ``"builtin"``, a hub name, the path of a local folder, or a ``ModelSpec``.
        devices: ``"auto"``, a device, or a list of them; see ``PoolConfig``, whose every field is a keyword here.
        workers: workers in all; ``None``: what was tuned, else one a GPU, or what the cores and the memory allow.
        threads_per_worker: compute threads of each; ``None``: what was tuned, else the cores are shared out.
        options: the other fields of ``PoolConfig``.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        model: str | ModelSpec = BUILTIN,
        *,
        devices: str | Sequence[str] = "auto",
        workers: int | None = None,
        threads_per_worker: int | None = None,
        **options: Any,
    ) -> None:
        self.spec = _spec(model)
        options.update(devices=devices, workers=workers, threads_per_worker=threads_per_worker)
        self.config = PoolConfig.of(options)
        self.spec.check_devices(self.config.devices)
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._closed = False
        self._dispatcher: Dispatcher | None = None
        self._plan: Plan | None = None

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
            RuntimeError: no process may be started here: see ``check_may_start``.
        """
        self._check_open()
        dispatcher = self._dispatcher
        try:
            if dispatcher is None:
                with self._lock:
                    self._check_open()
                    if self._dispatcher is None:
                        check_may_start(self.config)
                        self._plan = make_plan(self.config, self.spec)
                        config = dataclasses.replace(self.config, batch_tokens=self._plan.batch_tokens)
                        dispatcher = Dispatcher(self.spec, self._plan.seats, config)
                        weakref.finalize(self, dispatcher.close, drain=True).atexit = False
                        _leave_with_interpreter(dispatcher)
                        dispatcher.start()
                        self._dispatcher = dispatcher
                    dispatcher = self._dispatcher
            dispatcher.started.wait()
        except BaseException:  # Ctrl-C, or no thread to be had
            if dispatcher is not None:
                dispatcher.close(drain=False)
                dispatcher.join()  # it may be launching workers, which an interpreter that exits lets nobody do
            raise
        error = dispatcher.started.error
        if error is not None:
            dispatcher.close(drain=False)
            dispatcher.join()
            raise copy.copy(error)  # one for each call: raising an error adds to its traceback
        return self

    def close(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, end the workers, and wait until they are gone. Does nothing on a closed pool.

        Args:
            drain: finish what is pending first; otherwise it fails with ``PoolClosedError`` and workers are killed.
            timeout: seconds to drain for, after which what is left fails as with ``drain=False``; ``None``: no limit.
        """
        if os.getpid() != self._owner:  # nor can a fork be sure of the lock
            return
        with self._lock:
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

    def __enter__(self) -> RerankerPool:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close(drain=kind is None)

    def reload(self, model: str | ModelSpec) -> None:
        """Replace the model without a pause: load it in new workers, switch to them, let the old ones finish and leave.

        Returns once new requests go to the new model. A request is scored wholly by one of the two. Until the old
        workers have left, both models are in memory.

        Raises:
            ModelLoadError: it could not be loaded; the pool goes on with the old one.
            RerankError: another reload is under way.
        """
        spec = _spec(model)
        spec.check_devices(self.config.devices)
        dispatcher = self._running()
        dispatcher.reload(spec).get()
        self.spec = spec

    # Work.

    def submit(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        timeout: float | None = None,
        priority: int = 0,
        on_timeout: OnTimeout = "raise",
    ) -> Future[list[RerankResult]]:
        """Rank ``documents`` by relevance to ``query``.

        Args:
            query: the query.
            documents: the documents, any number of them; not one string.
            top_n: how many of the best to return; ``None``: all.
            timeout: seconds from now until the request expires; what is not scored then is dropped.
            priority: from -8 to 8; each step doubles the request's share of the workers, and none starves the others.
            on_timeout: ``"raise"`` RequestTimeoutError, or ``"partial"``: the ranking of what is scored by then,
                followed by the rest with a ``relevance_score`` of ``None``.

        Returns:
            A future of the results, best first; equal scores in the order submitted. ``cancel()`` works until it is
            done, and its done-callbacks run on threads of their own. It may hold RequestTimeoutError, ScoringError,
            WorkerCrashedError or PoolClosedError.

        Raises:
            TypeError, ValueError: naming the argument; also for a model of several labels, which ranks nothing.
            PoolClosedError, PoolOverloadedError: the request was not taken.
            ModelLoadError: from ``start``, if this is the first request.
        """
        dispatcher, request = self._ranking(query, documents, top_n, timeout, priority, on_timeout)
        return self._enter(dispatcher, request)

    def submit_pairs(
        self,
        pairs: Iterable[Sequence[str]],
        *,
        timeout: float | None = None,
        priority: int = 0,
        on_timeout: OnTimeout = "raise",
    ) -> Future[Scores]:
        """Score ``(query, document)`` pairs, as ``CrossEncoder.predict`` does.

        Args:
            pairs: the pairs, in any mixture of queries.
            timeout, priority, on_timeout: as for ``submit``; a partial result has NaN where there is no score.

        Returns:
            A future of float32 scores in the order of ``pairs``: shape (n,), or (n, num_labels) if there are several.

        Raises:
            As ``submit``.
        """
        return self._enter(*self._scoring(pairs, timeout, priority, on_timeout))

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        timeout: float | None = None,
        priority: int = 0,
        on_timeout: OnTimeout = "raise",
    ) -> list[RerankResult]:
        """``submit(...).result()``: rank and wait. Interrupted, it cancels the request."""
        results: list[RerankResult] = self._result(
            *self._ranking(query, documents, top_n, timeout, priority, on_timeout)
        )
        return results

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        timeout: float | None = None,
        priority: int = 0,
        on_timeout: OnTimeout = "raise",
    ) -> list[RerankResult]:
        """``submit`` for asyncio: the loop goes on meanwhile, even while the pool starts or is full.

        Cancelling the task cancels the request.
        """
        kept = documents_of(documents)
        if self._has_started:
            dispatcher, request = self._ranking(query, kept, top_n, timeout, priority, on_timeout)
            if self._admitted(dispatcher, request, may_wait=False):
                return await asyncio.wrap_future(request.future)
            call = partial(self._enter, dispatcher, request)
        else:
            call = partial(
                self.submit,
                query,
                kept,
                top_n=top_n,
                timeout=timeout,
                priority=priority,
                on_timeout=on_timeout,
            )
        submitting = asyncio.ensure_future(asyncio.to_thread(call))
        try:
            future = await asyncio.shield(submitting)
        except asyncio.CancelledError:
            submitting.add_done_callback(_cancel_submitted)
            raise
        return await asyncio.wrap_future(future)

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str] | None = None,
        *,
        sentences: Sequence[Sequence[str]] | Sequence[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **rest: Any,
    ) -> Any:
        """``CrossEncoder.predict``: scores of one pair or of a list of them, and wait.

        Args:
            inputs: pairs, or one pair; ``sentences`` is its name in sentence-transformers before 6.
            batch_size: accepted; workers batch by tokens.
            show_progress_bar: accepted; nothing is shown.
            activation_fn: must be ``None``: it belongs to the model here (``ModelSpec.activation``).
            apply_softmax: with several labels, make each pair's scores sum to 1.
            convert_to_numpy, convert_to_tensor: what to return; tensors import torch into this process.
            rest: ``prompt_name``, ``prompt``, ``device``, ``pool`` and ``chunk_size`` of sentence-transformers 6, which
                must be ``None`` for the same reason.

        Returns:
            A float32 array of shape (n,) or (n, num_labels), or without the first dimension for one pair; or a tensor,
            or a list of tensors, as ``CrossEncoder`` would.
        """
        del batch_size, show_progress_bar
        check_predict_options(activation_fn=activation_fn, **rest)
        given = inputs if inputs is not None else sentences
        if given is None or isinstance(given, str):
            raise TypeError(f"inputs: pairs of (query, document) are needed, not {shown(given)}")
        single = len(given) > 0 and isinstance(given[0], str)
        pairs = cast("Sequence[Sequence[str]]", [given] if single else given)
        scores = self._result(*self._scoring(pairs))
        if apply_softmax and scores.ndim > 1:
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        result: Any = scores
        if convert_to_tensor or not convert_to_numpy:
            import torch

            result = torch.from_numpy(scores.copy())
            if not convert_to_tensor:
                result = list(result)
        return result[0] if single else result

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        **rest: Any,
    ) -> list[dict[str, Any]]:
        """``CrossEncoder.rank``: dicts of ``corpus_id``, ``score`` and, if asked for, ``text``, best first.

        ``batch_size``, ``show_progress_bar``, ``activation_fn`` and the rest are as for ``predict``.
        """
        del batch_size, show_progress_bar
        check_predict_options(activation_fn=activation_fn, **rest)
        ranked = self.rerank(query, documents, top_n=top_k)
        results: list[dict[str, Any]] = [{"corpus_id": r.index, "score": r.relevance_score} for r in ranked]
        if return_documents:
            for result, r in zip(results, ranked, strict=True):
                result["text"] = r.document
        return results

    # Looking in.

    def stats(self) -> PoolStats:
        """Counters since the start, and what is pending; zeros before the start, the last state after the close."""
        dispatcher = self._dispatcher
        return PoolStats() if dispatcher is None else dispatcher.stats()

    def workers(self) -> list[WorkerInfo]:
        """Each seat and the worker in it; none before the start."""
        dispatcher = self._dispatcher
        return [] if dispatcher is None else dispatcher.workers()

    def memory(self) -> PoolMemory:
        """RSS, USS and PSS of the parent and of each worker now alive, and the bytes of each worker's weights."""
        workers = []
        for info in self.workers():
            if info.pid is not None:
                try:
                    workers.append(_memory(info.pid, info.weights_bytes, info.mapped_bytes))
                except psutil.NoSuchProcess:  # it died since
                    pass
        return PoolMemory(_memory(os.getpid()), tuple(workers))

    @property
    def plan(self) -> Plan:
        """The seats, and why there are so many."""
        return self._plan or make_plan(self.config, self.spec)

    # Within.

    def _check_open(self) -> None:
        if os.getpid() != self._owner:
            raise PoolClosedError(f"this pool belongs to process {self._owner}; a fork of it needs a pool of its own")
        if self._closed:
            raise PoolClosedError("the pool is closed")

    @property
    def _has_started(self) -> bool:
        return self._dispatcher is not None and self._dispatcher.facts is not None

    def _running(self) -> Dispatcher:
        self._check_open()
        if not self._has_started:
            self.start()
        dispatcher = self._dispatcher
        assert dispatcher is not None
        return dispatcher

    def _ranking(
        self,
        query: str,
        documents: Iterable[str],
        top_n: int | None,
        timeout: float | None,
        priority: int,
        on_timeout: OnTimeout,
    ) -> tuple[Dispatcher, Request]:
        """The request that ``submit`` makes of its arguments, and who is to have it."""
        text = text_of("query", query)
        kept = documents_of(documents)
        check_top_n(top_n)
        pairs = [(text, text_of("documents", document, i)) for i, document in enumerate(kept)]
        return self._request(pairs, partial(_rank, kept, top_n), timeout, priority, on_timeout, ranking=True)

    def _scoring(
        self,
        pairs: Iterable[Sequence[str]],
        timeout: float | None = None,
        priority: int = 0,
        on_timeout: OnTimeout = "raise",
    ) -> tuple[Dispatcher, Request]:
        """The request that ``submit_pairs`` makes of its arguments, and who is to have it."""
        return self._request(pairs_of(pairs), _all_scores, timeout, priority, on_timeout, ranking=False)

    def _request(
        self,
        pairs: list[Pair],
        finish: Callable[[Scores, npt.NDArray[np.bool_]], Any],
        timeout: float | None,
        priority: int,
        on_timeout: OnTimeout,
        *,
        ranking: bool,
    ) -> tuple[Dispatcher, Request]:
        deadline = deadline_of(timeout)
        check_priority(priority)
        check_on_timeout(on_timeout)
        dispatcher = self._running()
        facts = dispatcher.facts
        assert facts is not None
        if ranking and facts.num_labels != 1:
            raise ValueError(
                f"{self.spec.name} gives {facts.num_labels} scores a pair, and ranking needs one: use submit_pairs"
            )
        request = Request(
            pairs,
            _lengths(pairs, facts.max_length),
            finish,
            keys=digests(pairs) if self.config.score_cache else None,
            priority=priority,
            deadline=deadline,
            timeout=timeout,
            partial=on_timeout == "partial",
            num_labels=facts.num_labels,
            ranking=ranking,
        )
        return dispatcher, request

    def _result(self, dispatcher: Dispatcher, request: Request) -> Any:
        """Hand ``request`` over and wait for its result. Interrupted, cancel it."""
        try:
            return self._enter(dispatcher, request).result()
        finally:
            request.future.cancel()  # of a finished one: nothing

    def _enter(self, dispatcher: Dispatcher, request: Request) -> Future[Any]:
        """Hand ``request`` over, once there is room for it; its future."""
        self._admitted(dispatcher, request, may_wait=True)
        return request.future

    def _admitted(self, dispatcher: Dispatcher, request: Request, *, may_wait: bool) -> bool:
        """Hand ``request`` over, or resolve it here; ``False`` where that would have to wait and may not."""
        if not request.pairs:
            request.resolve()
            return True
        try:
            admitted = dispatcher.admission.admit(
                request, len(request.pairs), request.total_tokens, request.deadline, request.timeout, may_wait=may_wait
            )
            if admitted:
                dispatcher.submit(request)
        except RequestTimeoutError:
            if not request.partial:
                raise
            request.resolve()  # with what there is: nothing
            return True
        except BaseException:  # Ctrl-C: nobody has the future
            dispatcher.admission.release(request)
            request.future.cancel()
            raise
        return admitted

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


def _spec(model: str | ModelSpec) -> ModelSpec:
    spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
    spec.check_exists()
    return spec


def _lengths(pairs: Sequence[Pair], max_length: int | None) -> list[int]:
    """Estimated tokens of each pair. Most requests have one query: it is measured once."""
    queries: dict[str, int] = {}
    lengths = []
    for query, document in pairs:
        tokens = queries.get(query)
        if tokens is None:
            tokens = queries[query] = estimate_text(query)
        lengths.append(estimate_pair(tokens, document, max_length))
    return lengths


def _rank(
    documents: Sequence[str], top_n: int | None, scores: Scores, scored: npt.NDArray[np.bool_]
) -> list[RerankResult]:
    order = np.argsort(-scores, kind="stable")[:top_n]  # NaN, and so what is unscored, comes last
    values = scores.tolist()
    if scored.all():
        return [RerankResult(i, values[i], documents[i]) for i in order.tolist()]
    return [RerankResult(i, values[i] if scored[i] else None, documents[i]) for i in order.tolist()]


def _all_scores(scores: Scores, scored: npt.NDArray[np.bool_]) -> Scores:
    return scores


def _cancel_submitted(submitting: asyncio.Future[Future[Any]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()


def _memory(pid: int, weights_bytes: int = 0, mapped_bytes: int = 0) -> WorkerMemory:
    process = psutil.Process(pid)
    try:
        full = process.memory_full_info()
        return WorkerMemory(pid, full.rss, full.uss, getattr(full, "pss", None), weights_bytes, mapped_bytes)
    except psutil.AccessDenied:
        return WorkerMemory(pid, process.memory_info().rss, None, None, weights_bytes, mapped_bytes)


# Every dispatcher of this process that may still be running.
_dispatchers: weakref.WeakSet[Dispatcher] = weakref.WeakSet()


def _leave_with_interpreter(dispatcher: Dispatcher) -> None:
    """Close ``dispatcher`` when the interpreter exits, or refuse if it is exiting already."""
    global _registered
    if not _registered:
        try:
            # Before concurrent.futures' own hook, which would wait for running slices: hooks run last in, first out,
            # and this is the only place that comes before it. atexit is too late: its threads have been joined by then.
            threading._register_atexit(_close_all)  # type: ignore[attr-defined]
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
