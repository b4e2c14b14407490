"""The plan: cores, quota and memory -> workers and threads, for machines other than this one too."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FAKE, START_METHODS

from mp_rerank import ModelLoadError, ModelSpec, PoolConfig, RerankerPool
from mp_rerank._planning import tuning_cache
from mp_rerank._planning.checkpoint import weight_files, will_be_mapped
from mp_rerank._planning.machine import Machine, Node
from mp_rerank._planning.plan import (
    WORKER_BYTES,
    Plan,
    Seat,
    default_batch_tokens,
    estimate_memory,
    fitting_workers,
    make_plan,
    worthwhile_workers,
)
from mp_rerank._workers.child import set_threads

MakePool = Callable[..., RerankerPool]

GIB = 2**30

MAKE_PLAN = "mp_rerank._scheduling.dispatcher.make_plan"


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


def test_a_gpu_gets_a_few_workers_for_a_small_model(tmp_path: Path) -> None:
    """As many as there are cores and memory for, and no more than are any use."""
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"")
    spec = ModelSpec(str(tmp_path))

    def workers(config: PoolConfig | None = None, size: int = 90 * 2**20, **options: Any) -> list[tuple[str, int]]:
        os.truncate(weights, size)
        made = make_plan(config or PoolConfig(), spec, machine(**{"cores": 16, "gpus": ("cuda:0",), **options}))
        return [(seat.device, seat.threads) for seat in made.seats]

    assert workers() == [("cuda:0", 4)] * 4
    assert workers(cores=64) == [("cuda:0", 16)] * 4
    assert workers(cores=8) == [("cuda:0", 4)] * 2
    assert workers(cores=2) == [("cuda:0", 2)]
    assert workers(memory=8 * GIB) == [("cuda:0", 8)] * 2
    assert workers(gpus=("cuda:0", "cuda:1")) == [("cuda:0", 4), ("cuda:1", 4)] * 2
    assert workers(size=GIB) == [("cuda:0", 16)]
    assert workers(PoolConfig(workers=1)) == [("cuda:0", 16)]
    assert workers(PoolConfig(devices=["cuda:0", "cuda:0"])) == [("cuda:0", 8)] * 2
    assert workers(PoolConfig(devices=["cuda:0", "cpu"])) == [("cuda:0", 8), ("cpu", 8)]


def test_a_backend_of_the_cpu_is_given_no_gpu() -> None:
    made = make_plan(PoolConfig(), ModelSpec("model", backend="onnx"), machine(cores=2, gpus=("cuda:0",)))
    assert list(made.seats) == [Seat("cpu", 1)] * 2
    assert "backend='onnx': the CPU" in made.reasons


def test_a_list_of_devices_is_one_worker_each() -> None:
    on = machine(cores=8, gpus=("cuda:0",))
    assert [seat.device for seat in seats(PoolConfig(devices=["cuda:0", "cpu", "cpu"]), on)] == ["cuda:0", "cpu", "cpu"]


def test_a_thread_is_one_worker_whatever_the_machine() -> None:
    assert len(seats(PoolConfig(isolation="thread"), machine(cores=64))) == 1


# Pinning: a test machine's nodes have their logical CPUs one after the other.


def with_nodes(*cores: int, threads_a_core: int = 2) -> Machine:
    """A machine of NUMA nodes with so many cores each."""
    nodes, start = [], 0
    for count in cores:
        nodes.append(Node(tuple(range(start, start + threads_a_core * count)), count))
        start += threads_a_core * count
    return replace(machine(cores=sum(cores)), nodes=tuple(nodes))


def on_each(made: Plan, on: Machine) -> list[int]:
    """How many of the seats are on each node."""
    return [sum(seat.cpus == node.cpus for seat in made.seats) for node in on.nodes]


def test_workers_are_kept_on_numa_nodes_by_their_cores() -> None:
    on = with_nodes(4, 2)
    made = make_plan(PoolConfig(), FAKE, on)
    assert on_each(made, on) == [4, 2]
    assert "pinned to NUMA nodes, not to single cores: 4, 2 workers on the 2 nodes" in made.reasons
    made = make_plan(PoolConfig(workers=3), FAKE, on)
    assert [seat.threads for seat in made.seats] == [2] * 3
    assert on_each(made, on) == [2, 1]


def test_one_node_is_no_reason_to_pin() -> None:
    for on in (machine(), with_nodes(8)):
        assert {seat.cpus for seat in make_plan(PoolConfig(), FAKE, on).seats} == {()}


def test_nothing_is_pinned_that_needs_more_than_a_node_or_must_not_be() -> None:
    on = with_nodes(4, 4)
    wide = make_plan(PoolConfig(workers=1), FAKE, on)
    assert wide.seats == (Seat("cpu", 8),)
    assert "not pinned: 8 threads are more than a NUMA node has cores" in wide.reasons
    for config in (PoolConfig(pin=False), PoolConfig(isolation="thread", threads_per_worker=1)):
        made = make_plan(config, FAKE, on)
        assert {seat.cpus for seat in made.seats} == {()}
        assert not any("pinned" in reason for reason in made.reasons)


def test_a_gpu_s_worker_is_not_pinned() -> None:
    on = with_nodes(2, 2)
    made = make_plan(PoolConfig(devices=["cuda:0", "cpu", "cpu"], threads_per_worker=1), FAKE, on)
    assert made.seats[0].cpus == ()
    assert on_each(made, on) == [1, 1]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_a_worker_stays_on_its_seat_s_cpus_and_is_bound_to_no_single_one(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setattr(MAKE_PLAN, lambda *_: Plan((Seat("cpu", 1, (cpus[-1],)), Seat("cpu", 1)), ()))
    with make_pool() as pool:
        for worker, expected in zip(pool.workers(), ([cpus[-1]], cpus), strict=True):
            assert worker.pid is not None
            process = psutil.Process(worker.pid)
            assert process.cpu_affinity() == expected
            assert {os.sched_getaffinity(thread.id) == set(expected) for thread in process.threads()} == {True}


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_what_is_imported_later_is_told_not_to_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(os, "environ", environment := dict(os.environ))
    set_threads(3)
    assert (environment["OMP_NUM_THREADS"], environment["OMP_PROC_BIND"]) == ("3", "false")
    assert "GOMP_CPU_AFFINITY" not in environment


def test_cpus_that_are_gone_are_a_warning(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MAKE_PLAN, lambda *_: Plan((Seat("cpu", 1, (100_000,)),), ()))
    with make_pool(workers=1) as pool:
        assert len(pool.rerank("query", ["document"])) == 1
    assert "cannot be kept on the CPUs (100000,)" in caplog.text


# Where the model's files lie, and what they hold.


def safetensors(path: Path, dtypes: list[str], size: int) -> None:
    """A file with such a header and so many bytes in all."""
    header = {str(i): {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]} for i, dtype in enumerate(dtypes)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(size)


def test_weights_that_workers_share_are_in_memory_once(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", ["F32", "F32", "I64"], 2 * GIB)
    on = machine(cores=8, memory=12 * GIB)
    spec = ModelSpec(str(tmp_path))

    def fitting(**fields: object) -> int:
        return fitting_workers(on, replace(spec, **fields), PoolConfig())[0]  # type: ignore[arg-type]

    assert fitting() == fitting(dtype="float32") == fitting(dtype="auto") == 3  # prepacking copies most of them
    assert fitting(prepack=False) == 17
    assert fitting(weights="private") == fitting(dtype="bfloat16") == fitting(weights="private", prepack=False) == 2
    assert "that they share" in fitting_workers(on, spec, PoolConfig())[1]


def test_memory_is_estimated_with_shared_weights_once(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    spec = ModelSpec(str(tmp_path))
    for fields, more in (({}, 2), ({"prepack": False}, 0), ({"weights": "private"}, 4)):
        one, two = (estimate_memory(replace(spec, **fields), workers) for workers in (1, 2))  # type: ignore[arg-type]
        assert two - one == WORKER_BYTES + more * GIB
        assert one - (two - one) == (0 if "weights" in fields else 2 * GIB)
    assert estimate_memory(ModelSpec("org/not-here"), 3) == 3 * WORKER_BYTES, "nobody knows its size"


def test_batches_are_larger_where_products_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, half = ModelSpec("org/model"), ModelSpec("org/model", dtype="bfloat16")
    assert [default_batch_tokens(spec, "cpu") for spec in (plain, half)] == [1024, 2048]
    monkeypatch.setattr("mp_rerank._planning.plan.has_amx", lambda: True)
    assert [default_batch_tokens(spec, "cpu") for spec in (plain, half)] == [2048, 2048]
    assert default_batch_tokens(ModelSpec("org/model", backend="onnx"), "cpu") == 1024, "it has no kernels of ours"


def test_with_amx_prepacked_float32_weights_are_half_as_large_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    monkeypatch.setattr("mp_rerank._planning.plan.has_amx", lambda: True)
    for fields, each in (({}, 3), ({"prepack": False}, 0), ({"dtype": "bfloat16"}, 4), ({"weights": "private"}, 5)):
        one, two = (estimate_memory(ModelSpec(str(tmp_path), **fields), workers) for workers in (1, 2))  # type: ignore[arg-type]
        assert two - one == WORKER_BYTES + each * GIB


def test_workers_that_are_forked_are_counted_by_what_is_their_own(tmp_path: Path) -> None:
    """Of a model that each spawned worker would have its own copies of, a template's workers share them."""
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    spec, on = ModelSpec(str(tmp_path)), machine(cores=32, memory=12 * GIB)
    found = {method: make_plan(PoolConfig(start_method=method), spec, on) for method in START_METHODS}  # type: ignore[arg-type]
    assert len(found["spawn"].seats) == 3
    assert len(found["forkserver"].seats) == 3
    forked = found["fork-model"]
    assert len(forked.seats) == 32
    assert "2048 MiB of weights that they share with their template" in " ".join(forked.reasons)
    suggested = [reason for reason in found["spawn"].reasons if "fork-model" in reason]
    assert suggested == [
        "start_method='fork-model' would have memory for 32 workers (150 MiB each, with 2048 MiB of weights that they "
        "share with their template)"
    ]
    assert not any("would have" in reason for reason in forked.reasons)
    one = estimate_memory(spec, 1, "fork-model")
    assert estimate_memory(spec, 2, "fork-model") - one == 150 * 2**20


def test_each_numa_node_s_template_counts(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    on = replace(machine(cores=64, memory=12 * GIB), nodes=(Node((0,), 32), Node((1,), 32)))
    fitting = {
        pin: fitting_workers(on, ModelSpec(str(tmp_path)), PoolConfig(start_method="fork-model", pin=pin))[0]
        for pin in (True, False)
    }
    assert fitting == {True: 18, False: 35}


def test_a_template_is_not_suggested_where_it_would_not_work(tmp_path: Path) -> None:
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    reasons = make_plan(PoolConfig(), ModelSpec(str(tmp_path), backend="onnx"), machine(memory=8 * GIB)).reasons
    assert any("memory for no more" in reason for reason in reasons)
    assert not any("fork-model" in reason for reason in reasons)


def test_a_template_has_no_gpu() -> None:
    with pytest.raises(ValueError, match=r"CPU only, .* are cuda:0 here: say devices='cpu'"):
        seats(PoolConfig(start_method="fork-model"), machine(gpus=("cuda:0",)))


def test_no_more_workers_are_worth_starting_than_there_is_work_for(tmp_path: Path) -> None:
    assert worthwhile_workers(ModelSpec(), 500) == 1
    assert worthwhile_workers(ModelSpec(), 10**6) > 5
    safetensors(tmp_path / "model.safetensors", ["F32"], 2 * GIB)
    assert worthwhile_workers(ModelSpec(str(tmp_path)), 500) == 1
    assert worthwhile_workers(ModelSpec(str(tmp_path)), 5000) == 6


@pytest.mark.parametrize(
    ("dtypes", "shared_by"),
    [(["BF16"], {"bfloat16", "auto"}), (["F16", "I64"], {"float16", "auto"}), (["F32", "F16"], set()), ([], set())],
)
def test_only_the_file_s_own_dtype_is_shared(tmp_path: Path, dtypes: list[str], shared_by: set[str]) -> None:
    safetensors(tmp_path / "model.safetensors", dtypes, 1000)
    specs = {dtype: ModelSpec(str(tmp_path), dtype=dtype) for dtype in (None, "float32", "bfloat16", "float16", "auto")}
    assert {dtype for dtype, spec in specs.items() if will_be_mapped(spec, weight_files(spec))} == shared_by


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 9, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{,"])
def test_a_file_that_is_no_checkpoint_is_not_shared(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    assert not will_be_mapped(ModelSpec(str(tmp_path)), weight_files(ModelSpec(str(tmp_path))))


def test_a_pickle_is_not_shared(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    assert not will_be_mapped(ModelSpec(str(tmp_path)), weight_files(ModelSpec(str(tmp_path))))


def test_a_model_in_the_hub_s_cache_has_its_size_by_branch_and_by_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    repository = tmp_path / "hub/models--some--model"
    snapshot = repository / "snapshots/abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc")
    (snapshot / "model.safetensors").write_bytes(b"1234")
    (snapshot / "pytorch_model.bin").write_bytes(b"123")
    for revision in (None, "main", "abc"):
        assert weight_files(ModelSpec("some/model", revision=revision)) == [snapshot / "model.safetensors"]
    for elsewhere in (ModelSpec("some/model", revision="v2"), ModelSpec("other/model"), FAKE):
        assert weight_files(elsewhere) == []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert weight_files(ModelSpec("some/model")) == []


def test_a_hub_model_without_a_home_folder_is_an_error_at_once_that_names_the_cure(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no passwd entry either
    with pytest.raises(ModelLoadError, match="set HF_HOME to a folder"):
        make_pool("somebody/reranker").start()


def test_a_user_without_a_home_folder_has_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MP_RERANK_TUNED", "1")
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", lambda uid: {}[uid])  # the user is not in the list
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("some/model")
    with pytest.raises(RuntimeError):
        Path("~").expanduser()
    assert weight_files(spec) == []
    assert make_plan(PoolConfig(devices="cpu"), spec, machine(cores=2)).seats == (Seat("cpu", 1),) * 2
    answer = tuning_cache.Tuned(1, 1, 512, 1.0, 1.0, "2026-01-31")
    with pytest.raises(OSError, match="no home folder; set XDG_CACHE_HOME"):
        tuning_cache.keep(answer, spec, ["cpu"], machine())
    assert list(tmp_path.iterdir()) == [], "no folder called ~"


def test_links_in_the_hub_s_cache_whose_files_are_gone_do_not_count(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    (tmp_path / "pytorch_model.bin").write_bytes(b"1")
    assert weight_files(ModelSpec(str(tmp_path))) == [tmp_path / "pytorch_model.bin"]
