"""The plan: cores, quota and memory -> workers and threads, for machines other than this one too."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import FAKE

from mp_rerank import ModelSpec, PoolConfig, plan
from mp_rerank.plan import Machine, Seat, make_plan

GIB = 2**30


def machine(
    *, cores: int = 8, quota: float | None = None, memory: int = 64 * GIB, gpus: tuple[str, ...] = ()
) -> Machine:
    return Machine(
        logical=2 * cores, affinity=2 * cores, physical=cores, quota=quota, memory_available=memory, gpus=gpus
    )


def seats(config: PoolConfig, on: Machine, spec: ModelSpec = FAKE) -> list[Seat]:
    return list(make_plan(config, spec, on).seats)


def test_one_worker_of_one_thread_for_each_physical_core() -> None:
    assert seats(PoolConfig(), machine(cores=8)) == [Seat("cpu", 1)] * 8


def test_a_container_s_quota_counts_more_than_its_cores() -> None:
    assert seats(PoolConfig(), machine(cores=8, quota=2.5)) == [Seat("cpu", 1)] * 2
    assert seats(PoolConfig(), machine(cores=8, quota=0.5)) == [Seat("cpu", 1)]


def test_little_memory_means_fewer_workers_with_more_threads(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as weights:
        weights.truncate(2 * GIB)
    spec = ModelSpec(str(tmp_path))
    made = make_plan(PoolConfig(), spec, machine(cores=8, memory=12 * GIB))
    assert list(made.seats) == [Seat("cpu", 4)] * 2
    assert any("memory for no more" in reason for reason in made.reasons)


def test_workers_asked_for_share_the_cores() -> None:
    assert seats(PoolConfig(workers=2), machine(cores=8)) == [Seat("cpu", 4)] * 2
    assert seats(PoolConfig(workers=16), machine(cores=8)) == [Seat("cpu", 1)] * 16
    assert seats(PoolConfig(workers=2, threads_per_worker=1), machine(cores=8)) == [Seat("cpu", 1)] * 2


def test_every_gpu_gets_a_worker() -> None:
    on = machine(gpus=("cuda:0", "cuda:1"))
    assert [seat.device for seat in seats(PoolConfig(), on)] == ["cuda:0", "cuda:1"]
    assert [seat.device for seat in seats(PoolConfig(devices="cuda"), on)] == ["cuda:0", "cuda:1"]
    assert [seat.device for seat in seats(PoolConfig(devices="cuda:1"), on)] == ["cuda:1"]
    assert [seat.device for seat in seats(PoolConfig(workers=4), on)] == ["cuda:0", "cuda:1"] * 2
    assert [seat.device for seat in seats(PoolConfig(devices="cpu", workers=1), on)] == ["cpu"]


def test_a_list_of_devices_is_one_worker_each() -> None:
    on = machine(cores=8, gpus=("cuda:0",))
    assert [seat.device for seat in seats(PoolConfig(devices=["cuda:0", "cpu", "cpu"]), on)] == ["cuda:0", "cpu", "cpu"]


def test_a_thread_is_one_worker_whatever_the_machine() -> None:
    assert len(seats(PoolConfig(isolation="thread"), machine(cores=64))) == 1


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.cfs_quota_us": "400000", "cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "not a number"}, None),
        ({}, None),
    ],
)
def test_quotas_are_read_in_both_versions_of_cgroups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], quota: float | None
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(plan, "_cgroup_folders", lambda controller: [tmp_path])
    assert plan._cpu_quota() == quota


def test_a_container_s_memory_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "memory.max").write_text(str(3 * GIB))
    (tmp_path / "memory.current").write_text(str(1 * GIB))
    monkeypatch.setattr(plan, "_cgroup_folders", lambda controller: [tmp_path])
    assert plan._memory_available() <= 2 * GIB


def test_gpus_are_counted_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan.platform, "system", lambda: "Linux")
    monkeypatch.setattr(plan, "_torch_has_cuda", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert plan._gpus() == ("cuda:0", "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert plan._gpus() == ()
    monkeypatch.setattr(plan, "_torch_has_cuda", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert plan._gpus() == ()


def test_this_machine_can_be_read() -> None:
    here = plan.read_machine()
    assert 1 <= here.cores <= here.physical <= here.affinity <= here.logical
    assert here.memory_available > 0
