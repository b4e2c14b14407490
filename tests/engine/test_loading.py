"""A worker proves its model before it scores: whole, on its device, of its dtype, and the same as the others'."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PATIENCE

from mp_rerank import ModelLoadError, ModelSpec, RerankerPool

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.loading import prove  # noqa: E402

pytestmark = pytest.mark.real

MakePool = Callable[..., RerankerPool]

CPU = torch.device("cpu")
PAIRS = [(query, document) for query in models.TEXT[:3] for document in models.TEXT]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return models.build("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture
def broken(folder: str, tmp_path: Path) -> Path:
    """A copy of the model, for breaking."""
    for file in Path(folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


class Net(torch.nn.Module):
    """Two layers, and two buffers, one of which no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 4)
        self.last = torch.nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(5))
        self.register_buffer("angles", torch.zeros(6), persistent=False)


# The proof.


def test_a_whole_model_is_told_by_its_dtype_and_size() -> None:
    numbers = 3 * 4 + 4 + 4 + 1 + 5 + 6
    assert prove(Net(), CPU, None) == prove(Net(), CPU, "float32") == ("float32", numbers * 4)
    assert prove(Net().bfloat16(), CPU, "bfloat16") == ("bfloat16", numbers * 2)
    assert prove(Net(), torch.device("cpu:0"), "auto") == ("float32", numbers * 4)


def test_tied_weights_count_once() -> None:
    net = Net()
    size = prove(net, CPU, None)[1]
    net.copy = net.last
    assert prove(net, CPU, None)[1] == size


@pytest.mark.parametrize("name", ["first.weight", "last.bias", "mean", "angles"])
def test_a_tensor_without_its_data_is_refused_by_name(name: str) -> None:
    net = Net()
    path, _, leaf = name.rpartition(".")
    owner = net.get_submodule(path)
    tensor = getattr(owner, leaf)
    meta = tensor.detach().to("meta")
    setattr(owner, leaf, torch.nn.Parameter(meta) if isinstance(tensor, torch.nn.Parameter) else meta)
    with pytest.raises(ValueError, match=f"{name} is on the meta device"):
        prove(net, CPU, None)


def test_a_model_on_another_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"first\.weight is on cpu, not on cuda:1"):
        prove(Net(), torch.device("cuda:1"), None)


def test_another_dtype_than_the_one_asked_for_is_refused() -> None:
    net = Net()
    net.last.half()
    with pytest.raises(ValueError, match=r"last\.weight is float16, not the float32"):
        prove(net, CPU, "float32")
    with pytest.raises(ValueError, match=r"first\.weight is float32, not the float16"):
        prove(net, CPU, "float16")
    assert prove(net, CPU, None)[0] == "float32+float16"


def test_what_an_architecture_keeps_in_float32_may_be_float32() -> None:
    net = Net().bfloat16()
    net.last.float()
    net._keep_in_fp32_modules = ["last"]
    assert prove(net, CPU, "bfloat16")[0] == "bfloat16+float32"


def test_whole_numbers_and_quantized_weights_have_no_dtype_to_prove() -> None:
    net = Net()
    net.packed = torch.nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)
    net.stored = torch.nn.Parameter(torch.zeros(7).to(torch.float8_e4m3fn), requires_grad=False)
    assert prove(net, CPU, "float32") == ("float32+float8_e4m3fn", 32 * 4 + 7 + 7)


def test_the_engine_takes_a_loaders_module_with_a_predict_of_its_own() -> None:
    engine = Engine(ModelSpec("any", loader="models:load_lengthwise"), "cpu", None, 16, models.Lengthwise())
    assert engine.predict([("q", "d" * length) for length in (9, 300, 0, 42)]).tolist() == [4.5, 150, 0, 21]
    with pytest.raises(TypeError, match=r"Linear, which has no predict\(pairs\)"):
        Engine(ModelSpec("any", loader="models:load_lengthwise"), "cpu", None, 16, torch.nn.Linear(1, 1))


# At the start.


def test_workers_say_what_they_hold(folder: str, make_pool: MakePool, device: str) -> None:
    with make_pool(folder, devices=device, workers=2, threads_per_worker=1) as pool:
        workers = pool.workers()
        assert [worker.slot for worker in workers] == [0, 1]
        assert len({worker.pid for worker in workers} - {os.getpid()}) == 2
        assert {worker.pid for worker in workers} < {child.pid for child in psutil.Process().children(recursive=True)}
        model = models.load(folder, device)
        size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        for worker in workers:
            assert (worker.state, worker.generation, worker.device, worker.threads) == ("ready", 1, device, 1)
            assert (worker.dtype, worker.num_labels, worker.max_length) == ("float32", 1, models.MAX_LENGTH)
            assert worker.weights_bytes == size
            assert worker.load_seconds > 0
            assert np.isfinite(worker.canary).all()
        assert np.allclose(workers[0].canary, workers[1].canary, rtol=1e-5, atol=1e-5)
        assert len(set(workers[0].canary)) > 1
        assert [memory.weights_bytes for memory in pool.memory().workers] == [size, size]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_comes_in_the_dtype_asked_for_and_scores_nearly_the_same(
    dtype: str, folder: str, make_pool: MakePool, device: str
) -> None:
    expected = models.load(folder, device).predict(PAIRS)
    size = prove(models.load(folder, device), torch.device(device), None)[1]
    with make_pool(ModelSpec(folder, dtype=dtype), devices=device, workers=1) as pool:
        [worker] = pool.workers()
        assert worker.dtype == dtype
        assert worker.weights_bytes < 0.6 * size
        scores = pool.predict(PAIRS)
    assert np.abs(scores - expected).max() < 0.02 < np.ptp(expected)
    assert np.corrcoef(scores, expected)[0, 1] > 0.99


def test_auto_is_the_checkpoints_own_dtype(broken: Path, make_pool: MakePool, device: str) -> None:
    model = models.load(str(broken), device)
    model.model.to(torch.bfloat16)
    model.model.save_pretrained(broken)
    with make_pool(ModelSpec(str(broken), dtype="auto"), devices=device, isolation="thread") as pool:
        assert [worker.dtype for worker in pool.workers()] == ["bfloat16"]


@pytest.mark.parametrize(("dtype", "short"), [("bfloat16", "bf16"), ("float16", "fp16")])
@pytest.mark.parametrize("supported", [False, True])
def test_where_the_cpu_has_nothing_for_16_bits_a_worker_says_so(
    supported: bool,
    dtype: str,
    short: str,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{short}_supported", lambda: supported)
    Engine(ModelSpec(folder, dtype=dtype, prepack=False), "cpu", None, 1024)
    assert (f"no instructions for {dtype}" in caplog.text) != supported
    caplog.clear()
    Engine(ModelSpec(folder, dtype="float32", prepack=False), "cpu", None, 1024)
    assert "no instructions" not in caplog.text


def refused(pool: RerankerPool, model: str, device: str) -> ModelLoadError:
    """The error ``pool`` starts with, which every later call meets too."""
    with pytest.raises(ModelLoadError) as caught:
        pool.start()
    error = caught.value
    assert model in str(error)
    assert device in str(error)
    assert error.cause in str(error)
    assert (error.model, error.device) == (model, device)
    assert {worker.state for worker in pool.workers()} <= {"failed", "closed"}
    with pytest.raises(ModelLoadError):
        pool.submit("query", ["document"])
    return error


def test_a_checkpoint_without_a_trained_head_is_refused(tmp_path: Path, make_pool: MakePool, device: str) -> None:
    headless = models.build_headless(tmp_path)
    error = refused(make_pool(headless, devices=device, workers=1), headless, device)
    assert "drawn at random" in error.cause
    assert "trained head" in error.cause


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_nor_is_one_taken_in_16_bits(dtype: str, tmp_path: Path, make_pool: MakePool, device: str) -> None:
    headless = models.build_headless(tmp_path)
    error = refused(make_pool(ModelSpec(headless, dtype=dtype), devices=device, workers=1), headless, device)
    assert "drawn at random" in error.cause


def test_missing_weights_are_refused(broken: Path, make_pool: MakePool, device: str) -> None:
    (broken / "model.safetensors").unlink()
    error = refused(make_pool(str(broken), devices=device, workers=1), str(broken), device)
    assert "safetensors" in error.cause
    assert "Traceback" in error.details


def test_weights_cut_short_are_refused(broken: Path, make_pool: MakePool, device: str) -> None:
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    error = refused(make_pool(str(broken), devices=device, workers=1), str(broken), device)
    assert "SafetensorError" in error.cause


def test_weights_that_score_no_number_are_refused(broken: Path, make_pool: MakePool, device: str) -> None:
    model = models.load(str(broken), device)
    model.model.classifier.bias.data.fill_(float("nan"))
    model.model.save_pretrained(broken)
    error = refused(make_pool(str(broken), devices=device, isolation="thread"), str(broken), device)
    assert "not finite" in error.cause


def test_a_broken_config_is_refused(broken: Path, make_pool: MakePool, device: str) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "model_type": "no-such-architecture"}))
    error = refused(make_pool(str(broken), devices=device, isolation="thread"), str(broken), device)
    assert "no-such-architecture" in error.cause


@pytest.mark.parametrize(
    ("loader", "isolation", "cause"),
    [
        ("models:load_on_meta", "process", "classifier.weight is on the meta device"),
        ("models:load_elsewhere", "thread", "is on the meta device|is on cpu, not on"),
    ],
)
def test_a_loader_that_leaves_weights_elsewhere_is_refused(
    loader: str, isolation: str, cause: str, folder: str, make_pool: MakePool, device: str
) -> None:
    pool = make_pool(ModelSpec(folder, loader=loader), devices=device, isolation=isolation)
    with pytest.raises(ModelLoadError, match=cause) as caught:
        pool.start()
    assert caught.value.device == device
    assert loader in caught.value.model


def test_a_name_no_hub_gives_is_refused(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name = "nobody/no-such-reranker"
    error = refused(make_pool(name, devices=device, workers=1), name, device)
    assert error.cause.startswith(("OSError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"))


def test_a_folder_that_takes_a_hub_model_s_name_later_is_not_loaded_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = ModelSpec("somebody/reranker")
    (tmp_path / "somebody").mkdir()
    (tmp_path / "somebody" / "reranker").symlink_to(folder)
    with pytest.raises(ValueError, match=r"a folder of that name in .* is not loaded in its place"):
        Engine(spec, "cpu", None, 256)


# The parent.

LIGHT = """
import json, sys
import mp_rerank
bare = sorted({"numpy", "psutil", "torch", "transformers", "tqdm", "concurrent.futures"} & set(sys.modules))
with mp_rerank.RerankerPool(sys.argv[1], devices=sys.argv[2], workers=1) as pool:
    ranked = pool.rerank("How many people live in Berlin?", ["Bread is baked.", "Berlin has people."])
    pairs = pool.predict([("query", "document")])
heavy = {"torch", "transformers", "sentence_transformers", "tokenizers", "huggingface_hub", "safetensors"}
print(json.dumps([bare, [result.relevance_score for result in ranked], sorted(heavy & set(sys.modules))]))
"""


def test_the_parent_never_imports_torch(folder: str, device: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIGHT, folder, device],
        capture_output=True,
        text=True,
        timeout=PATIENCE * 3,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    bare, scores, heavy = json.loads(done.stdout)
    assert bare == []
    assert heavy == []
    documents = ["Bread is baked.", "Berlin has people."]
    expected = models.load(folder, device).predict([("How many people live in Berlin?", d) for d in documents])
    assert np.allclose(scores, sorted(expected, reverse=True), rtol=1e-5, atol=1e-5)
