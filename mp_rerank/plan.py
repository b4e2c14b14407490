"""Which workers to start: cores and memory -> seats (device and threads), without importing torch.

Measured on CPUs, several workers of one thread beat one worker of several: a reranker's matrices are too small to be
worth splitting. So the plan is one worker a physical core that this process may use, fewer where memory does not hold
that many models (each worker then gets more threads), and one worker a GPU. On a machine of several NUMA nodes each
worker on the CPU is kept on one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mp_rerank.checkpoint import weight_files
from mp_rerank.config import ModelSpec, PoolConfig
from mp_rerank.machine import Machine, Node, read_machine

__all__ = ["Plan", "Seat", "make_plan"]

# A spawned worker's own memory apart from the weights: 330 MB measured for imports and a small model's buffers.
WORKER_BYTES = 450 * 2**20
# Loading holds the weights about twice for a moment.
WEIGHTS_FACTOR = 2.0
# Left to the parent and everything else.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Seat:
    """A place for a worker, for as long as the pool lives.

    Attributes:
        device: the worker's device.
        threads: its compute threads.
        cpus: the logical CPUs it is kept on; empty: wherever this process may run.
    """

    device: str
    threads: int
    cpus: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The seats, and in words why there are so many."""

    seats: tuple[Seat, ...]
    reasons: tuple[str, ...]


def make_plan(config: PoolConfig, spec: ModelSpec, machine: Machine | None = None) -> Plan:
    """Seats for ``config`` on ``machine`` (this one, where ``None``).

    Raises:
        ValueError: a device was named that this machine plainly lacks.
    """
    machine = machine or read_machine()
    reasons = [str(machine)]
    devices = _devices(config, machine, reasons)
    named = len(devices) > 1 or devices[0] != "cpu"
    if config.isolation == "thread":
        count = 1
        reasons.append("1 worker: isolation='thread' is one model in this process")
    elif config.workers is not None:
        count = config.workers
        reasons.append(f"{count} workers: asked for")
    elif named:
        count = len(devices)
        reasons.append(f"{count} workers: one for each device ({', '.join(devices)})")
    else:
        count = _workers_for_cpu(machine, spec, reasons)
    seated = [devices[i % len(devices)] for i in range(count)]
    threads = config.threads_per_worker
    if threads is None:
        threads = max(1, machine.cores // count)
        reasons.append(f"{threads} threads a worker: {machine.cores} cores shared by {count}")
    else:
        reasons.append(f"{threads} threads a worker: asked for")
    seats = [Seat(device, threads) for device in seated]
    if config.pin and config.isolation == "process":
        seats = _on_nodes(seats, machine.nodes, reasons)
    return Plan(tuple(seats), tuple(reasons))


def _devices(config: PoolConfig, machine: Machine, reasons: list[str]) -> list[str]:
    devices: list[str] = []
    for device in config.devices:
        if device == "auto":
            devices += machine.gpus or ["cpu"]
        elif device == "cuda":
            # Without a way to count them, one is a fair guess; the worker proves it.
            devices += [gpu for gpu in machine.gpus if gpu.startswith("cuda")] or ["cuda:0"]
        else:
            devices.append(device)
    if "auto" in config.devices and not machine.gpus:
        reasons.append("no GPU that the installed torch can use: the CPU")
    return devices


def _workers_for_cpu(machine: Machine, spec: ModelSpec, reasons: list[str]) -> int:
    weights = sum(file.stat().st_size for file in weight_files(spec))
    each = WORKER_BYTES + int(weights * WEIGHTS_FACTOR)
    fitting = max(1, int(machine.memory_available * MEMORY_SHARE) // each)
    size = f"{weights / 2**20:.0f} MiB of weights" if weights else "weights of unknown size"
    if fitting < machine.cores:
        reasons.append(f"{fitting} workers: memory for no more ({each / 2**20:.0f} MiB each, with {size})")
        return fitting
    reasons.append(
        f"{machine.cores} workers: one a core; memory would hold {fitting} ({each / 2**20:.0f} MiB each, with {size})"
    )
    return machine.cores


def _on_nodes(seats: list[Seat], nodes: Sequence[Node], reasons: list[str]) -> list[Seat]:
    """``seats``, those on the CPU each kept on one NUMA node, shared out by the nodes' cores.

    Not on one core: a neighbour on that core, of which a shared machine says nothing, would have the worker wait while
    others are idle. The node is enough for what counts, that the weights are in the memory next to the cores.
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
