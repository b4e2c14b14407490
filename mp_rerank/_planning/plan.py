"""Which workers to start: from cores and memory to seats (a device and threads), without importing torch.

On CPUs several workers of one thread are faster than one worker of several threads (measured): a reranker's matrices
are too small to split. So the plan is one worker for each physical core that this process may use. Where memory does
not hold so many models, there are fewer workers, of more threads each. GPUs get one worker each; or a few, if the model
is so small that its texts take longer to tokenize than to score. On a machine of several NUMA nodes each worker on the
CPU is kept on one node. If ``mp-rerank tune`` has measured what is fastest, that is the plan.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mp_rerank._planning.checkpoint import weight_files, will_be_mapped
from mp_rerank._planning.machine import Machine, Node, has_amx, read_machine
from mp_rerank._planning.tuning_cache import Tuned, look_up
from mp_rerank.config import ModelSpec, PoolConfig

__all__ = ["Plan", "Seat", "default_batch_tokens", "estimate_memory", "fitting_workers", "make_plan"]

# A worker's own memory, without the weights, by start method. Measured after 10,000 texts with the built-in model: 425,
# 181 and less than 100 MiB. Larger models have larger buffers.
OWN_BYTES = {"spawn": 450 * 2**20, "forkserver": 240 * 2**20, "fork-model": 150 * 2**20}
WORKER_BYTES = OWN_BYTES["spawn"]
# Memory, without the weights, of what workers are forked from.
FORKED_FROM_BYTES = {"spawn": 0, "forkserver": 300 * 2**20, "fork-model": 450 * 2**20}
# For a moment loading holds the weights about twice, and so does prepacking.
WEIGHTS_FACTOR = 2
# On CPUs with AMX, prepacked float32 weights take so much more: a float32 number is three of 16 bits there.
TILED_FACTOR = 0.5
FULL_DTYPES = (None, "auto", "float32")  # what may be float32
# The part of the available memory to plan with; the rest is for the parent and everything else.
MEMORY_SHARE = 0.8
# Seconds that a spawned worker takes of a core to start.
START_SECONDS = 4.0
# Tokens a second of a core, times the bytes of the weights: MiniLM-L6 has 90 MB and scores 5,000.
TOKENS_BYTES_A_SECOND = 4.5e11
UNKNOWN_WEIGHTS_BYTES = 400 * 2**20
# With weights up to this, a GPU has more than one worker: so many cores for each, and so many workers at most. A pair
# takes MiniLM-L6 in float16 9 us on an H200, and to tokenize it takes 21 us on 16 cores, 70 us on 4 of them.
SMALL_WEIGHTS_BYTES = 256 * 2**20
CORES_A_GPU_WORKER = 4
WORKERS_A_GPU = 4
# A worker's own memory, not the GPU's, where CUDA is loaded into it.
GPU_WORKER_BYTES = 3 * 2**30
# Tokens of a forward pass. The values between two layers should fit a core's caches, so 16 bits allow twice as many. On
# AMX float32 does too: products are so fast there that what a batch takes besides counts more. Ettin-17m's shape, two
# workers, float32: 464 pairs a second with 1024 tokens, 541 with 2048.
CPU_BATCH_TOKENS = 1024
CPU_BATCH_TOKENS_FAST = 2048
GPU_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Seat:
    """A place for a worker while the pool lives.

    Attributes:
        device: the worker's device.
        threads: its compute threads.
        cpus: the logical CPUs it is kept on; empty: wherever this process may run.
        place: what starts the worker, and where, if not on this machine (``_workers.dask.Place``); its text is the name
            of that place.
    """

    device: str
    threads: int
    cpus: tuple[int, ...] = ()
    place: Any = None


@dataclass(frozen=True)
class Plan:
    """The seats, and the reasons for their number.

    Attributes:
        seats: one for each worker.
        reasons: sentences, in the order of the decisions.
        batch_tokens: padded tokens of a forward pass, as asked for or tuned; ``None``: the device's default.
    """

    seats: tuple[Seat, ...]
    reasons: tuple[str, ...]
    batch_tokens: int | None = None


def make_plan(config: PoolConfig, spec: ModelSpec, machine: Machine | None = None) -> Plan:
    """Seats for ``config`` on ``machine`` (``None``: this one).

    What the caller asks for comes first, then what was tuned for this model and machine, then the rule at the top of
    this module.
    """
    if config.cluster is not None and config.workers is None:
        why = f"each worker of the Dask cluster at {config.cluster.address}; none here, as workers= asks for none"
        return Plan((), (why,), config.batch_tokens)
    machine = machine or read_machine()
    reasons = [str(machine)]
    devices = _devices(config, spec, machine, reasons)
    if config.isolation == "thread":
        reasons.append("1 worker: isolation='thread' is one model in this process")
        threads = config.threads_per_worker or machine.cores
        return Plan((Seat(devices[0], threads),), tuple(reasons), config.batch_tokens)
    named = len(devices) > 1 or devices[0] != "cpu"
    tuned = _tuned(config, spec, devices, machine, reasons)
    asked = config.threads_per_worker
    if config.workers is not None:
        count = config.workers
        reasons.append(f"{count} workers: asked for")
    elif tuned is not None and asked is None:
        count = tuned.workers
        reasons.append(f"{count} workers: {_how(tuned)}")
    elif named:
        each, why = _workers_a_device(devices, spec, machine)
        count = each * len(devices)
        reasons.append(f"{count} workers: {why} ({', '.join(devices)})")
    else:
        count = _workers_for_cpu(machine, spec, config, reasons)
    seated = [devices[i % len(devices)] for i in range(count)]
    if asked is not None:
        threads = asked
        reasons.append(f"{threads} threads a worker: asked for")
    elif tuned is not None and config.workers is None:
        threads = tuned.threads
        reasons.append(f"{threads} threads a worker: tuned with them")
    else:
        threads = max(1, machine.cores // count)
        reasons.append(f"{threads} threads a worker: {machine.cores} cores shared by {count}")
    batch_tokens = config.batch_tokens
    if batch_tokens is None and tuned is not None and tuned.threads == threads:
        batch_tokens = tuned.batch_tokens
        reasons.append(f"batches of {batch_tokens} tokens: tuned for {threads} threads a worker on {tuned.measured_on}")
    seats = [Seat(device, threads) for device in seated]
    if config.pin:
        seats = _on_nodes(seats, machine.nodes, reasons)
    return Plan(tuple(seats), tuple(reasons), batch_tokens)


def fitting_workers(machine: Machine, spec: ModelSpec, config: PoolConfig) -> tuple[int, str]:
    """How many workers on the CPU the available memory holds, at least 1; and what each takes, in words."""
    templates = max(1, len(machine.nodes)) if config.pin else 1
    each, for_all, size = _bytes_of_workers(spec, config.start_method, templates)
    fitting = max(1, int(machine.memory_available * MEMORY_SHARE - for_all) // each)
    return fitting, f"{each / 2**20:.0f} MiB each, with {size}"


def estimate_memory(spec: ModelSpec, workers: int, start_method: str = "spawn") -> int:
    """Bytes that so many workers of the model take while they load, and less later; what they share is counted once.

    Too little for a model that is not on this disk yet: nobody knows its size.
    """
    each, for_all, _ = _bytes_of_workers(spec, start_method)
    return each * workers + for_all


def worthwhile_workers(spec: ModelSpec, tokens: int) -> int:
    """How many workers on the CPU are worth starting to score so many tokens once: at least 1.

    A worker takes seconds of a core to start: it is worth that if it has as much to score. What a token costs is a
    guess, by the size of the weights.
    """
    weights = _weights(weight_files(spec)) or UNKNOWN_WEIGHTS_BYTES
    seconds = tokens * weights / TOKENS_BYTES_A_SECOND
    return max(1, math.ceil(seconds / START_SECONDS))


def _bytes_of_workers(spec: ModelSpec, start_method: str, templates: int = 1) -> tuple[int, int, str]:
    """Bytes of each worker on the CPU; bytes of what all share; and the size of the weights, in words."""
    files = weight_files(spec)
    weights = _weights(files)
    size = f"{weights / 2**20:.0f} MiB of weights" if weights else "weights of unknown size"
    each, for_all = OWN_BYTES[start_method], FORKED_FROM_BYTES[start_method]
    mapped = will_be_mapped(spec, files)
    copied = (weights if spec.prepack else 0) if mapped else WEIGHTS_FACTOR * weights
    if spec.prepack and spec.dtype in FULL_DTYPES and has_amx():
        copied += int(TILED_FACTOR * weights)
    shared = weights if mapped else 0
    if start_method == "fork-model":  # the template's copies are for all
        return each, templates * (for_all + copied) + shared, f"{size} that they share with their template"
    return each + copied, for_all + shared, f"{size} that they share" if mapped else size


def _weights(files: Sequence[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def default_batch_tokens(spec: ModelSpec, device: str) -> int:
    """Tokens of a forward pass of the model on ``device``, if neither the caller nor a tuning says how many."""
    if not device.startswith("cpu"):
        return GPU_BATCH_TOKENS
    fast = spec.backend == "torch" and (spec.dtype in ("bfloat16", "float16") or has_amx())
    return CPU_BATCH_TOKENS_FAST if fast else CPU_BATCH_TOKENS


def _tuned(
    config: PoolConfig, spec: ModelSpec, devices: Sequence[str], machine: Machine, reasons: list[str]
) -> Tuned | None:
    """What was tuned, unless it is not to be used or the memory for it is missing."""
    if not config.tuned:
        return None
    tuned = look_up(spec, devices, machine)
    if tuned is not None and "cpu" in devices:
        fitting, size = fitting_workers(machine, spec, config)
        if tuned.workers > fitting:
            reasons.append(f"memory for {fitting} workers ({size}), not for the {tuned.workers} {_how(tuned)}")
            return None
    return tuned


def _how(tuned: Tuned) -> str:
    return f"tuned on {tuned.measured_on}: {tuned.times_the_default:.2f} times the default's speed"


def _devices(config: PoolConfig, spec: ModelSpec, machine: Machine, reasons: list[str]) -> list[str]:
    devices: list[str] = []
    usable = () if spec.cpu_only else machine.gpus
    for device in config.devices:
        if device == "auto":
            if usable and config.start_method == "fork-model":
                raise ValueError(
                    f"devices: start_method='fork-model' works on the CPU only, and devices='auto' are "
                    f"{', '.join(usable)} here: say devices='cpu'"
                )
            devices += usable or ["cpu"]
        elif device == "cuda":
            # If they cannot be counted, assume one; its worker will find out.
            devices += [gpu for gpu in machine.gpus if gpu.startswith("cuda")] or ["cuda:0"]
        else:
            devices.append(device)
    if "auto" in config.devices and not usable:
        why = f"backend={spec.backend!r}" if spec.cpu_only else "no GPU that the installed torch can use"
        reasons.append(f"{why}: the CPU")
    return devices


def _workers_a_device(devices: Sequence[str], spec: ModelSpec, machine: Machine) -> tuple[int, str]:
    """How many workers each of the named devices gets, and why."""
    weights = _weights(weight_files(spec))
    gpus = {device for device in devices if device.startswith("cuda")}
    if not 0 < weights <= SMALL_WEIGHTS_BYTES or len(gpus) < len(devices):
        return 1, "one for each device"
    cores = machine.cores // (CORES_A_GPU_WORKER * len(devices))
    memory = int(machine.memory_available * MEMORY_SHARE) // (GPU_WORKER_BYTES * len(devices))
    each = max(1, min(WORKERS_A_GPU, cores, memory))
    if each == 1:
        return 1, "one for each device"
    return each, f"{each} for each device, since {weights / 2**20:.0f} MiB of weights are less work than their texts"


def _workers_for_cpu(machine: Machine, spec: ModelSpec, config: PoolConfig, reasons: list[str]) -> int:
    fitting, size = fitting_workers(machine, spec, config)
    if fitting < machine.cores:
        reasons.append(f"{fitting} workers: memory for no more ({size})")
        _suggest_fork_model(machine, spec, config, fitting, reasons)
        return fitting
    reasons.append(f"{machine.cores} workers: one a core; memory would hold {fitting} ({size})")
    return machine.cores


def _suggest_fork_model(
    machine: Machine, spec: ModelSpec, config: PoolConfig, fitting: int, reasons: list[str]
) -> None:
    """Say so where memory would hold more workers if they were forked from the loaded model."""
    if config.start_method == "fork-model" or not sys.platform.startswith("linux"):
        return
    try:
        forking = replace(config, start_method="fork-model")
        forking.check_model(spec)
    except ValueError:
        return
    more, size = fitting_workers(machine, spec, forking)
    if more > fitting:
        reasons.append(f"start_method='fork-model' would have memory for {min(more, machine.cores)} workers ({size})")


def _on_nodes(seats: list[Seat], nodes: Sequence[Node], reasons: list[str]) -> list[Seat]:
    """``seats``, with each one on the CPU kept on one NUMA node. The nodes get seats in proportion to their cores.

    A seat is kept on a node, not on one core: another program on that core, which a shared machine does not show, would
    hold the worker up while other cores are idle. What counts is that the weights are in the memory next to the cores,
    and for that the node is enough.
    """
    on_cpu = [number for number, seat in enumerate(seats) if seat.device.startswith("cpu")]
    if len(nodes) < 2 or not on_cpu:
        return seats
    threads = seats[on_cpu[0]].threads
    if threads > max(node.physical for node in nodes):
        reasons.append(f"not pinned: {threads} threads are more than a NUMA node has cores")
        return seats
    taken = [0] * len(nodes)
    pinned = list(seats)
    for number in on_cpu:
        emptiest = min(range(len(nodes)), key=lambda i: (taken[i] + threads) / nodes[i].physical)
        taken[emptiest] += threads
        pinned[number] = replace(seats[number], cpus=nodes[emptiest].cpus)
    reasons.append(
        f"pinned to NUMA nodes, not to single cores: {', '.join(str(n // threads) for n in taken)} workers "
        f"on the {len(nodes)} nodes"
    )
    return pinned
