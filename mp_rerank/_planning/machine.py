"""What this process may use of its machine: cores, NUMA nodes, memory and GPUs, read without importing torch.

The smallest limit holds: the machine's, this process's CPU affinity, or that of any control group it is in (version 1
or 2). Everything is read from files below ``root``, so that a test can lay out another machine in a folder. Without
these files (another system, or a sandbox without ``/proc``) psutil is asked, then the C library.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["Machine", "Node", "has_amx", "read_machine"]

ROOT = Path("/")
KERNELS = Path(__file__).parents[1] / "_engine" / "amx" / "libmp_rerank_amx.so"


@dataclass(frozen=True)
class Node:
    """A NUMA node: cores with memory of their own, which the others reach more slowly.

    Attributes:
        cpus: logical CPUs of the node that this process may run on.
        physical: physical cores among those.
    """

    cpus: tuple[int, ...]
    physical: int


@dataclass(frozen=True)
class Machine:
    """What this process may use.

    Attributes:
        logical: logical CPUs of the machine.
        affinity: logical CPUs this process may run on.
        physical: physical cores among those.
        quota: how many CPUs' time the container allows; ``None`` without a limit.
        memory_available: bytes that can be taken without swapping, within the container's limit.
        gpus: the GPUs that torch would offer, such as ``("cuda:0",)``.
        memory_total: bytes of memory the machine has, within the container's limit; 0 if it is not known.
        cpu_model: the CPU's name for itself.
        nodes: the NUMA nodes that have a CPU for this process; one or none if all memory is equally near.
    """

    logical: int
    affinity: int
    physical: int
    quota: float | None
    memory_available: int
    gpus: tuple[str, ...]
    memory_total: int = 0
    cpu_model: str = ""
    nodes: tuple[Node, ...] = ()

    @property
    def cores(self) -> int:
        """How many cores to plan for: the physical ones, within the quota, at least 1."""
        cores = self.physical if self.quota is None else min(self.physical, math.floor(self.quota))
        return max(1, cores)

    def __str__(self) -> str:
        quota = "no CPU quota" if self.quota is None else f"a quota of {self.quota:g} CPUs"
        nodes = f" on {len(self.nodes)} NUMA nodes" if len(self.nodes) > 1 else ""
        gpus = ", ".join(self.gpus) or "none"
        return (
            f"{self.logical} logical CPUs, {self.affinity} allowed to this process, "
            f"{self.physical} physical cores{nodes}, {quota}; "
            f"{self.memory_available / 2**30:.1f} GiB of memory available; GPUs: {gpus}"
        )


def read_machine(root: Path = ROOT) -> Machine:
    """What this process may use of its machine, or of the one whose ``/proc`` and ``/sys`` are below ``root``."""
    cpus = _affinity(root)
    available, total = _memory(root)
    return Machine(
        logical=_logical(root),
        affinity=len(cpus),
        physical=_physical_cores(root, cpus),
        quota=_cpu_quota(root),
        memory_available=available,
        gpus=_gpus(),
        memory_total=total,
        cpu_model=_cpu_model(root),
        nodes=_nodes(root, cpus),
    )


# CPUs.


def _logical(root: Path) -> int:
    return len(_cpu_list(_text(root / "sys/devices/system/cpu/online"))) or os.cpu_count() or 1


def _affinity(root: Path) -> list[int]:
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status"), re.MULTILINE)
    if found and (cpus := _cpu_list(found[1])):
        return cpus
    try:
        if hasattr(os, "sched_getaffinity"):
            return sorted(os.sched_getaffinity(0))
        return list(psutil.Process().cpu_affinity())
    except (AttributeError, OSError, psutil.Error):  # macOS has no affinity
        return list(range(os.cpu_count() or 1))


def _physical_cores(root: Path, cpus: Sequence[int]) -> int:
    """Distinct cores behind the logical CPUs ``cpus``."""
    siblings = set()
    for cpu in cpus:
        listed = _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip()
        if not listed:
            return max(1, min(_whole_machine_s_cores() or len(cpus), len(cpus)))
        siblings.add(listed)
    return len(siblings)


def _whole_machine_s_cores() -> int | None:
    try:
        return psutil.cpu_count(logical=False)
    except (OSError, psutil.Error):  # no /proc
        return None


def _nodes(root: Path, cpus: Sequence[int]) -> tuple[Node, ...]:
    """The NUMA nodes that any of ``cpus`` is on, by their numbers."""
    folders = (root / "sys/devices/system/node").glob("node[0-9]*")
    nodes = []
    for folder in sorted(folders, key=lambda folder: int(folder.name.removeprefix("node"))):
        ours = sorted(set(_cpu_list(_text(folder / "cpulist"))) & set(cpus))
        if ours:
            nodes.append(Node(tuple(ours), _physical_cores(root, ours)))
    return tuple(nodes)


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        numbers = _numbers(folder / "cpu.max")
        if not numbers:
            numbers = _numbers(folder / "cpu.cfs_quota_us") + _numbers(folder / "cpu.cfs_period_us")
        if len(numbers) == 2 and numbers[0] > 0 and numbers[1] > 0:
            quotas.append(numbers[0] / numbers[1])
    tightest = min(quotas, default=math.inf)
    return None if math.isinf(tightest) else tightest


def _cpu_model(root: Path) -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def has_amx(root: Path = ROOT) -> bool:
    """Whether the CPU multiplies matrices in tiles, as far as Linux says, and this package has kernels that do so."""
    return _cpu_has_amx(root) and KERNELS.exists()


@functools.cache  # asked for with each slice, and a CPU stays what it is
def _cpu_has_amx(root: Path) -> bool:
    return bool(re.search(r"^flags\s*:.*\bamx_bf16\b", _text(root / "proc/cpuinfo"), re.MULTILINE))


# Memory.


def _memory(root: Path) -> tuple[int, int]:
    """Bytes available, and in all, the tightest limit counted."""
    available, total = _meminfo(root)
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file, cache in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _numbers(folder / limit_file), _numbers(folder / usage_file)
            if limit and usage:
                # The usage counts files that were read and can be dropped again, such as the weights.
                found = re.search(rf"^{cache} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                used = max(0.0, usage[0] - (float(found[1]) if found else 0.0))
                available = min(available, max(0.0, limit[0] - used))
                total = min(total, limit[0])
    return int(available), int(total)


def _meminfo(root: Path) -> tuple[float, float]:
    found = dict(re.findall(r"^(MemAvailable|MemTotal):\s*(\d+) kB$", _text(root / "proc/meminfo"), re.MULTILINE))
    if len(found) == 2:
        return float(found["MemAvailable"]) * 1024, float(found["MemTotal"]) * 1024
    try:
        memory = psutil.virtual_memory()
        return float(memory.available), float(memory.total)
    except (OSError, psutil.Error, ValueError):  # no /proc; a page that is not free may still be a cache's
        page = os.sysconf("SC_PAGE_SIZE")
        return float(page * os.sysconf("SC_AVPHYS_PAGES")), float(page * os.sysconf("SC_PHYS_PAGES"))


# Files.


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of those above it, version 2 and 1: the limits of all hold."""
    mounted = root / "sys/fs/cgroup"
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path:  # not the kernel's words
            continue
        if controllers == "":
            top = mounted
        elif controller in controllers.split(","):
            top = mounted / controller
        else:
            continue
        inner = top / path.lstrip("/")
        folders += [folder for folder in (inner, *inner.parents) if folder == top or top in folder.parents]
    return folders


def _text(path: Path) -> str:
    """What the file holds; an empty string if it cannot be read."""
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""


def _numbers(path: Path) -> list[float]:
    """The numbers in the file, ``max`` being infinity; none if the file is missing or holds another word."""
    try:
        return [math.inf if word == "max" else float(word) for word in _text(path).split()]
    except ValueError:
        return []


def _cpu_list(text: str) -> list[int]:
    """The kernel's ``0-3,8`` as ``[0, 1, 2, 3, 8]``; nothing if that is not what the text is."""
    cpus: list[int] = []
    for part in filter(None, text.strip().split(",")):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if found is None:
            return []
        cpus += range(int(found[1]), int(found[2] or found[1]) + 1)
    return cpus


# GPUs.


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
    try:
        found = importlib.util.find_spec("torch")
    except ValueError:  # what is imported under that name has no spec
        return False
    if found is None or found.origin is None:
        return False
    try:
        text = (Path(found.origin).parent / "version.py").read_text()
    except OSError:
        return False
    return re.search(r"^(cuda|hip)\b[^=]*=\s*['\"]", text, re.MULTILINE) is not None
