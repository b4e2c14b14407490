"""What a process may use of its machine, read from machines laid out in folders."""

from __future__ import annotations

import os
import sys
import types
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from mp_rerank import ModelSpec, PoolConfig
from mp_rerank._planning import machine
from mp_rerank._planning.machine import Machine, Node, read_machine
from mp_rerank._planning.plan import make_plan

GIB = 2**30


class Laid:
    """A machine of 8 logical CPUs, two to a core, on two NUMA nodes, with 16 GiB, of which 10 are available."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("sys/devices/system/cpu/online", "0-7\n")
        for cpu in range(8):
            self.write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", f"{cpu % 4},{cpu % 4 + 4}\n")
        self.write("sys/devices/system/node/node0/cpulist", "0-1,4-5\n")
        self.write("sys/devices/system/node/node1/cpulist", "2-3,6-7\n")
        self.write("sys/devices/system/node/node2/cpulist", "\n")  # memory without CPUs
        self.write("proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {10 * 2**20} kB\n")
        self.write("proc/cpuinfo", "processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t\t: fpu amx_bf16 amx_tile\n")
        self.allow("0-7")

    def write(self, path: str, text: str) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(text)

    def allow(self, cpus: str) -> None:
        self.write("proc/self/status", f"Name:\tpython\nCpus_allowed:\tff\nCpus_allowed_list:\t{cpus}\n")

    def read(self) -> Machine:
        return read_machine(self.root)


@pytest.fixture
def laid(tmp_path: Path) -> Laid:
    return Laid(tmp_path)


def test_a_machine_is_read_whole(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    found = laid.read()
    assert (found.logical, found.affinity, found.physical, found.quota) == (8, 8, 4, None)
    assert (found.memory_available, found.memory_total, found.cpu_model) == (10 * GIB, 16 * GIB, "Some CPU @ 3 GHz")
    assert found.nodes == (Node((0, 1, 4, 5), 2), Node((2, 3, 6, 7), 2))
    monkeypatch.setattr(machine, "KERNELS", laid.root)
    assert machine.has_amx(laid.root)
    monkeypatch.setattr(machine, "KERNELS", laid.root / "not built")
    assert not machine.has_amx(laid.root), "what has no kernels here is not counted on"
    assert "8 logical CPUs, 8 allowed to this process, 4 physical cores on 2 NUMA nodes, no CPU quota" in str(found)


def test_what_the_cpu_can_is_read_once(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher asks for each slice."""
    read: list[Path] = []
    text = machine._text
    monkeypatch.setattr(machine, "KERNELS", laid.root)
    monkeypatch.setattr(machine, "_text", lambda path: read.append(path) or text(path))
    assert [machine.has_amx(laid.root) for _ in range(3)] == [True] * 3
    assert read == [laid.root / "proc/cpuinfo"]


def test_cpus_that_are_not_allowed_do_not_count(laid: Laid) -> None:
    laid.allow("0,4-6")
    found = laid.read()
    assert (found.logical, found.affinity, found.physical) == (8, 4, 3)
    assert found.nodes == (Node((0, 4, 5), 2), Node((6,), 1))
    laid.allow("1,5")
    assert laid.read().nodes == (Node((1, 5), 1),)


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        ("0::/\n", {"cpu.max": "not a number"}, None),
        ("0::/\n", {}, None),
        ("0::/user/job\n", {"user/cpu.max": "300000 100000", "user/job/cpu.max": "max 100000"}, 3.0),
        ("0::/user/job\n", {"cpu.max": "100000 100000", "user/job/cpu.max": "300000 100000"}, 1.0),
        ("0::/of/the/host\n", {"cpu.max": "200000 100000"}, 2.0),  # its path is the host's, its files the container's
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ("4:cpu,cpuacct:/a\n", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 0.5),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ("4:cpuset:/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_quotas_are_read_in_both_versions_of_cgroups(
    laid: Laid, groups: str, files: dict[str, str], quota: float | None
) -> None:
    laid.write("proc/self/cgroup", groups)
    for name, text in files.items():
        laid.write(f"sys/fs/cgroup/{name}", text)
    assert laid.read().quota == quota


@pytest.mark.parametrize(
    ("groups", "folder", "names", "cache"),
    [
        ("0::/\n", "", ("memory.max", "memory.current"), "inactive_file"),
        ("5:memory:/\n", "memory/", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"),
    ],
)
def test_a_container_s_memory_limit_holds_and_files_it_read_do_not_count(
    laid: Laid, groups: str, folder: str, names: tuple[str, str], cache: str
) -> None:
    laid.write("proc/self/cgroup", groups)
    laid.write(f"sys/fs/cgroup/{folder}{names[0]}", str(4 * GIB))
    laid.write(f"sys/fs/cgroup/{folder}{names[1]}", str(3 * GIB))
    assert (laid.read().memory_available, laid.read().memory_total) == (1 * GIB, 4 * GIB)
    laid.write(f"sys/fs/cgroup/{folder}memory.stat", f"anon 1\n{cache} {2 * GIB}\n")
    assert laid.read().memory_available == 3 * GIB
    laid.write(f"sys/fs/cgroup/{folder}{names[0]}", "9223372036854771712")
    assert (laid.read().memory_available, laid.read().memory_total) == (10 * GIB, 16 * GIB)


def test_where_nothing_can_be_read_the_system_is_asked(tmp_path: Path) -> None:
    found = read_machine(tmp_path)
    assert 1 <= found.cores <= found.physical <= found.affinity <= found.logical
    assert found.memory_available > 0
    assert found.nodes == ()


def test_files_that_hold_something_else_are_as_good_as_missing(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = laid.read()
    laid.write("proc/self/cgroup", "nonsense\n0::\n")
    laid.write("sys/fs/cgroup/memory.max", "a lot")
    laid.write("sys/devices/system/node/node0/cpulist", "some\n")
    assert laid.read() == replace(whole, nodes=whole.nodes[1:])
    laid.write("proc/self/status", "Cpus_allowed_list:\tall\n")
    laid.write("proc/meminfo", "MemTotal: many\n")
    laid.write("sys/devices/system/cpu/online", "x-y\n")
    assert laid.read().affinity == len(os.sched_getaffinity(0))
    assert laid.read().memory_total > 0
    monkeypatch.setitem(sys.modules, "torch", types.ModuleType("torch"))  # a stub, which has no __spec__
    assert not machine._torch_has_cuda()


def test_without_proc_the_c_library_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path / "proc"))
    with pytest.raises((OSError, psutil.Error)):
        psutil.virtual_memory()
    found = read_machine(tmp_path)
    assert 1 <= found.cores <= found.physical <= found.affinity <= found.logical
    assert found.affinity == len(os.sched_getaffinity(0))
    assert 0 < found.memory_available < found.memory_total
    make_plan(PoolConfig(), ModelSpec(), found)


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert read_machine().gpus == ("cuda:0", "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert read_machine().gpus == ()
    monkeypatch.setattr(machine, "_torch_has_cuda", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert read_machine().gpus == ()


def test_this_machine_can_be_read() -> None:
    here = read_machine()
    assert 1 <= here.cores <= here.physical <= here.affinity <= here.logical
    assert here.memory_available > 0
