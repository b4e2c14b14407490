"""Which workers to start: cores and memory -> seats (device and threads), without importing torch.

Measured on CPUs, several workers of one thread beat one worker of several: a reranker's matrices are too small to be
worth splitting. So the plan is one worker a physical core that this process may use, fewer where memory does not hold
that many models (each worker then gets more threads), and one worker a GPU.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

from mp_rerank.config import ModelSpec, PoolConfig

__all__ = ["Machine", "Plan", "Seat", "make_plan", "read_machine"]

CGROUP = Path("/sys/fs/cgroup")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")

# A spawned worker's own memory apart from the weights: 330 MB measured for imports and a small model's buffers.
WORKER_BYTES = 450 * 2**20
# Loading holds the weights about twice for a moment.
WEIGHTS_FACTOR = 2.0
# Left to the parent and everything else.
MEMORY_SHARE = 0.8


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        logical: logical CPUs of the machine.
        affinity: logical CPUs this process may run on.
        physical: physical cores among those.
        quota: CPUs' worth of time the container allows; ``None`` without a limit.
        memory_available: bytes that can be taken without swapping, within the container's limit.
        gpus: devices torch would offer, such as ``("cuda:0",)``.
    """

    logical: int
    affinity: int
    physical: int
    quota: float | None
    memory_available: int
    gpus: tuple[str, ...]

    @property
    def cores(self) -> int:
        """Cores worth a worker: the physical ones, as far as the quota goes, at least 1."""
        cores = self.physical if self.quota is None else min(self.physical, math.floor(self.quota))
        return max(1, cores)


@dataclass(frozen=True)
class Seat:
    """A place for a worker: its device and compute threads, for as long as the pool lives."""

    device: str
    threads: int


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
    reasons = [_describe(machine)]
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
    return Plan(tuple(Seat(device, threads) for device in seated), tuple(reasons))


def read_machine() -> Machine:
    """What this process may use of its machine, within its affinity and its container."""
    cpus = _affinity()
    return Machine(
        logical=os.cpu_count() or 1,
        affinity=len(cpus),
        physical=_physical_cores(cpus),
        quota=_cpu_quota(),
        memory_available=_memory_available(),
        gpus=_gpus(),
    )


def _describe(machine: Machine) -> str:
    quota = "no CPU quota" if machine.quota is None else f"a quota of {machine.quota:g} CPUs"
    gpus = ", ".join(machine.gpus) or "none"
    return (
        f"{machine.logical} logical CPUs, {machine.affinity} allowed to this process, "
        f"{machine.physical} physical cores, {quota}; "
        f"{machine.memory_available / 2**30:.1f} GiB of memory available; GPUs: {gpus}"
    )


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
    weights = _weights_bytes(spec)
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


def _weights_bytes(spec: ModelSpec) -> int:
    """Bytes of the checkpoint's weight files; 0 where they are not in a local folder."""
    folder = Path(spec.path)
    if spec.loader is not None or not folder.is_dir():
        return 0
    sizes = [sum(f.stat().st_size for f in folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin")]
    return max(sizes)


def _affinity() -> list[int]:
    try:
        return list(psutil.Process().cpu_affinity())
    except AttributeError:  # macOS has no affinity
        return list(range(os.cpu_count() or 1))


def _physical_cores(cpus: list[int]) -> int:
    """Distinct cores behind the logical CPUs ``cpus``."""
    siblings = set()
    for cpu in cpus:
        try:
            siblings.add((CPU_TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            whole = psutil.cpu_count(logical=False) or len(cpus)
            return max(1, min(whole, len(cpus)))
    return len(siblings)


def _cgroup_folders(controller: str) -> list[Path]:
    """The cgroup folder of this process and every one above it, v2 and v1: a limit anywhere on the way holds."""
    folders: list[Path] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root = CGROUP
        elif controller in controllers.split(","):
            root = CGROUP / controller
        else:
            continue
        inner = root / path.lstrip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == root or root in folder.parents]
    return folders


def _read_numbers(path: Path) -> list[float]:
    """The file's numbers; none for a missing file, and infinity for the word ``max``."""
    try:
        return [math.inf if word == "max" else float(word) for word in path.read_text().split()]
    except (OSError, ValueError):
        return []


def _cpu_quota() -> float | None:
    quotas = []
    for folder in _cgroup_folders("cpu"):
        numbers = _read_numbers(folder / "cpu.max")
        if not numbers:
            numbers = _read_numbers(folder / "cpu.cfs_quota_us") + _read_numbers(folder / "cpu.cfs_period_us")
        if len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
            quotas.append(numbers[0] / numbers[1])
    tightest = min(quotas, default=math.inf)
    return None if math.isinf(tightest) else tightest


def _memory_available() -> int:
    available = float(psutil.virtual_memory().available)
    for folder in _cgroup_folders("memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read_numbers(folder / limit_file), _read_numbers(folder / usage_file)
            if limit and usage:
                available = min(available, max(0.0, limit[0] - usage[0]))
    return int(available)


def _gpus() -> tuple[str, ...]:
    """Devices the installed torch would offer, found without importing it."""
    if platform.system() == "Darwin":
        return ("mps",) if platform.machine() == "arm64" else ()
    if not _torch_has_cuda():
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = [name for name in visible.split(",") if name.strip() and name.strip() != "-1"]
        return tuple(f"cuda:{i}" for i in range(len(names)))
    command = shutil.which("nvidia-smi")
    if command is None:
        return ()
    try:
        listing = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    count = sum(line.startswith("GPU ") for line in listing.splitlines())
    return tuple(f"cuda:{i}" for i in range(count))


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA (or ROCm) build, read from its version file."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^(cuda|hip)\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
