"""What the pool returns: rankings, and reports on its workers, its counters and its memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = [
    "CallerStats",
    "KeptModel",
    "ModelPoolsStats",
    "PoolMemory",
    "PoolStats",
    "RerankResult",
    "Scores",
    "WorkerExit",
    "WorkerInfo",
    "WorkerMemory",
]

#: of n pairs: shape (n,), or (n, num_labels) where the model gives several
Scores = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class RerankResult:
    """One ranked document.

    Attributes:
        index: its position among the documents submitted.
        relevance_score: the model's score after its activation, as ``CrossEncoder.predict`` gives it (float32 widened
            to float): what it means, and its range, is the model's (``WorkerInfo.activation``). ``None`` for a document
            that was not scored in time (``on_timeout="partial"``), or whose score is no finite number
            (``nan_scores="none"``).
        document: the document as it was submitted; of one submitted as a dict, its text.
        record: the dict itself, with whatever else is in it; ``None``: it was submitted as a text.
        tokens: how many tokens of the pair the model read, the query's and special ones included, as its tokenizer
            counts them; of all chunks together. ``None``: it was not read, or the model counts none.
        truncated: whether something of the pair was cut off to fit. ``None`` as for ``tokens``.
        passage: of a document that was divided (``long_documents="chunk"``): where its best chunk is, as
            ``document[start:end]``.
    """

    index: int
    relevance_score: float | None
    document: str
    record: Mapping[str, Any] | None = field(default=None, hash=False)  # a dict has no hash
    tokens: int | None = field(default=None, compare=False)
    truncated: bool | None = field(default=None, compare=False)
    passage: tuple[int, int] | None = field(default=None, compare=False)

    def __init__(
        self,
        index: int,
        relevance_score: float | None,
        document: str,
        record: Mapping[str, Any] | None = None,
        tokens: int | None = None,
        truncated: bool | None = None,
        passage: tuple[int, int] | None = None,
    ) -> None:
        # There is one for each document of each request: this takes half the time of the one that would be generated.
        _set_index(self, index)
        _set_score(self, relevance_score)
        _set_document(self, document)
        _set_record(self, record)
        _set_tokens(self, tokens)
        _set_truncated(self, truncated)
        _set_passage(self, passage)


_set_index, _set_score, _set_document, _set_record, _set_tokens, _set_truncated, _set_passage = (
    vars(RerankResult)[item.name].__set__ for item in fields(RerankResult)
)


ExitReason = Literal[
    "crashed",
    "hung",
    "unkillable",
    "idle_death",
    "device_lost",
    "recycled_slices",
    "recycled_memory",
    "idle_timeout",
    "reloaded",
    "load_failed",
    "launch_failed",
    "left",
]


@dataclass(frozen=True)
class WorkerExit:
    """How and when a worker ended.

    Attributes:
        reason: ``"crashed"``: it died with work to do: a slice, or its model to load. ``"hung"``: killed after
            ``hang_timeout`` or ``start_timeout``. ``"unkillable"``: hung, and did not end when it was killed.
            ``"idle_death"``: it died with nothing to do, as by the system for its memory. ``"device_lost"``: its
            process could not use its GPU any more. ``"recycled_slices"``, ``"recycled_memory"``: replaced after
            ``max_slices_per_worker`` or ``max_memory_per_worker``. ``"idle_timeout"``: it had nothing to do for
            that long. ``"reloaded"``: another model took its place. ``"load_failed"``: it could not load the model.
            ``"launch_failed"``: the system would start no process.
            ``"left"``: the Dask cluster took it away, or it cannot be reached any more.
        exit_code: of its process; negative for a signal; ``None`` where it was told to leave, or where nobody knows.
        signal: the signal's name, such as ``"SIGKILL"``; empty without one.
        at: when, in seconds since the epoch.
    """

    reason: ExitReason
    exit_code: int | None
    signal: str
    at: float


@dataclass(frozen=True)
class WorkerInfo:
    """One seat of the pool and the worker in it.

    Attributes:
        slot: the seat's number, from 0.
        state: ``starting``, ``ready``, ``draining``, ``restarting``, ``resting``, ``failed`` or ``closed``.
        generation: how many workers have had this seat; 1 is the first.
        device: the seat's device; its workers never leave it.
        threads: compute threads of the worker.
        pid: the worker's process (the caller's own under ``isolation="thread"``); ``None`` while there is none, or
            where it is on another machine.
        dtype: the dtype of the weights; two joined by ``+`` where the architecture itself mixes them.
        load_seconds: seconds for imports and loading, in the worker, or in the template it was forked from.
        weights_bytes: size of parameters and buffers.
        mapped_bytes: the part of ``weights_bytes`` that is in the pages of the checkpoint's file, which all workers
            share. The rest is the worker's own: weights on a GPU, of another dtype than the file's, from another
            format, prepacked, or with ``ModelSpec(weights="private")``. Known on Linux, else 0.
        num_labels: scores per pair.
        activation: what makes a score of what the network puts out: ``"Sigmoid"`` (from 0 to 1), ``"Identity"`` (any
            number: the logit), or another class of ``torch.nn`` or of yours; empty where a loader's model does not say.
        max_length: tokens a pair is truncated to; ``None`` where the model does not say.
        prompts: the names of its prompts, for ``prompt_name``.
        optimizations: what makes the model faster here and keeps its scores. ``"pipeline"``: texts are tokenized once
            and batches cut by their true lengths; ``"cuda_graphs"``: a batch on a GPU is one row, launched at once;
            ``"unpadded"``: no padding is computed; ``"shares_beginnings"``: what pairs of a batch begin with alike is
            computed once; ``"head_only"``: the last layer computes only what the head reads; ``"score_logits"``: only
            those of a vocabulary's logits that the score is made of; ``"attends_in_tiles"``: attention is computed by
            a kernel of this package in the CPU's AMX tiles; ``"prepacked"``: weights are laid out for the CPU;
            ``"amx"``: kernels of this package multiply by them in its AMX tiles; ``"computes_together"``: some layers
            at once; ``"whole_layers"``: a layer is one function. What is missing, and why, is logged as it starts.
        canary: the scores of the canary pairs; equal on every worker of a pool.
        tokens_per_second: estimated tokens scored per second, as last measured in this worker.
        last_exit: how the worker before it on this seat ended; ``None`` while it is the first.
        place: where in a Dask cluster: the address of the nanny, or of a worker that has none; empty on this machine.
    """

    slot: int
    state: str
    generation: int
    device: str
    threads: int
    pid: int | None = None
    dtype: str = ""
    load_seconds: float = 0.0
    weights_bytes: int = 0
    mapped_bytes: int = 0
    num_labels: int = 1
    activation: str = ""
    max_length: int | None = None
    prompts: tuple[str, ...] = ()
    optimizations: tuple[str, ...] = ()
    canary: tuple[float, ...] = ()
    tokens_per_second: float = 0.0
    last_exit: WorkerExit | None = None
    place: str = ""


@dataclass
class CallerStats:
    """Counters of one caller: of its requests, since its first or since it was last forgotten (see ``PoolStats``).

    Attributes:
        submitted: requests that were taken.
        completed, failed, cancelled, timed_out: requests that have ended, each in one of these ways; see ``PoolStats``.
        pending_requests: requests admitted and not finished.
        pending_pairs: their pairs, neither scored nor dropped.
    """

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    pending_requests: int = 0
    pending_pairs: int = 0


@dataclass
class PoolStats:
    """Counters since the pool's start, and what is pending now: a copy, taken at one moment.

    Attributes:
        submitted: requests that were taken.
        completed: requests that got their result in full.
        failed: requests that got an error other than a timeout.
        cancelled: requests that their callers cancelled.
        timed_out: requests whose deadline passed; those with a partial result count too.
        pending_requests: requests admitted and not finished.
        pending_pairs: their pairs, neither scored nor dropped.
        scored_pairs: pairs that workers have scored.
        scored_tokens: the tokens that models have read of those, as in ``RerankResult``. A model that does not tell
            what it reads adds nothing.
        truncated_pairs: those of ``scored_pairs`` of which something was cut off.
        coalesced_pairs: pairs that got their score together with an equal one that was pending (``coalesce``).
        cached_pairs: pairs whose score had been kept (``score_cache``). The hit rate is the share of ``cached_pairs``
            and ``coalesced_pairs`` in their sum with ``scored_pairs``.
        slices: slices that workers have scored; a slice is what a worker is given at a time.
        gathered_slices: those of them that held pairs of more than one request.
        split_requests: requests whose pairs went out in more than one slice.
        busy_seconds: seconds that workers spent scoring, summed over the workers.
        crashes: workers that died or were killed for hanging.
        restarts: workers started to replace another (after a crash, a recycling or a reload).
        recycled: workers replaced on reaching ``max_slices_per_worker`` or ``max_memory_per_worker``.
        reloads: models swapped in by ``reload``.
        exits: workers that ended, by the reason of their `WorkerExit`; not those that ended with the pool.
        callers: the counters of each caller by its name: of all that have a request pending, and of the 1,000 others
            that had one last. A caller that was forgotten and comes back is counted from 0.
        slice_sizes: ``slices`` by their pairs: how many had at most so many, and more than half of that. The keys are
            powers of two.
    """

    submitted: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    timed_out: int = 0
    pending_requests: int = 0
    pending_pairs: int = 0
    scored_pairs: int = 0
    scored_tokens: int = 0
    truncated_pairs: int = 0
    coalesced_pairs: int = 0
    cached_pairs: int = 0
    slices: int = 0
    gathered_slices: int = 0
    split_requests: int = 0
    busy_seconds: float = 0.0
    crashes: int = 0
    restarts: int = 0
    recycled: int = 0
    reloads: int = 0
    exits: dict[str, int] = field(default_factory=dict)
    callers: dict[str, CallerStats] = field(default_factory=dict)
    slice_sizes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of one process, in bytes, as psutil reads it.

    Attributes:
        pid: the process.
        rss: resident set size, shared pages included.
        uss: pages of this process alone; ``None`` where the platform or the permissions do not give it.
        pss: ``uss`` plus this process's part of shared pages (Linux only, else ``None``).
        weights_bytes: size of the model's parameters and buffers in it (0 for the parent).
        mapped_bytes: the part of ``weights_bytes`` that all workers share (see ``WorkerInfo``). It counts in ``rss``,
            in part in ``pss``, and in ``uss`` only while no other process uses it.
    """

    pid: int
    rss: int
    uss: int | None
    pss: int | None
    weights_bytes: int
    mapped_bytes: int = 0


@dataclass(frozen=True)
class PoolMemory:
    """Memory of the parent process and of each worker alive at the moment of asking.

    Attributes:
        parent: the process that has the pool.
        workers: the worker processes.
        templates: the processes that workers are forked from under ``start_method="fork-model"``.
    """

    parent: WorkerMemory
    workers: tuple[WorkerMemory, ...]
    templates: tuple[WorkerMemory, ...] = ()


@dataclass(frozen=True)
class KeptModel:
    """One model of ``ModelPools``, while it is kept.

    Attributes:
        model: its name or path.
        state: ``planning``; ``waiting`` for room; ``starting``; ``ready``; or ``leaving``: it is being retired.
        memory: bytes that its workers take; pages that several share are counted once.
        measured: whether ``memory`` is measured, or else estimated.
        workers: how many there are, or are to be; 0 while they are being planned.
        requests: those it has.
        waiting: those that wait for it to be loaded.
        idle_seconds: seconds since it had a request last; 0 while it has one.
    """

    model: str
    state: str
    memory: int
    measured: bool
    workers: int
    requests: int
    waiting: int
    idle_seconds: float


@dataclass(frozen=True)
class ModelPoolsStats:
    """What ``ModelPools`` keep at the moment of asking, and counters since they were made.

    Attributes:
        memory_limit: the bound, in bytes.
        memory: bytes of all workers there are, as in ``KeptModel``.
        models: those that are kept.
        started: how often a model was loaded.
        retired: how often one was told to leave.
        failed: how often one could not be loaded.
    """

    memory_limit: int
    memory: int
    models: tuple[KeptModel, ...]
    started: int
    retired: int
    failed: int
