"""Other runtimes score as torch does, to 1e-4 in float32, and rank much alike in int8."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelLoadError, ModelSpec, RerankerPool

pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = pytest.mark.real

MakePool = Callable[..., RerankerPool]

REQUIRED = os.environ.get("MP_RERANK_BACKENDS") == "required"
NEEDS = {"onnx": ("onnx", "onnxruntime"), "openvino": ("openvino",)}
QUERIES = models.TEXT[:4]
DOCUMENTS = [*models.TEXT, "", "one word", "word " * 5_000, "long " + " ".join(models.TEXT) * 20]
PAIRS = [(query, document) for query in QUERIES for document in DOCUMENTS]


def need(*modules: str) -> None:
    """Skip where one is not installed; fail instead where all are promised (``tox -e backends``)."""
    for module in modules:
        if REQUIRED:
            import_module(module)
        else:
            pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)


@pytest.fixture(params=NEEDS)
def backend(request: pytest.FixtureRequest) -> str:
    need(*NEEDS[request.param])
    return str(request.param)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.build("bert", tmp_path_factory.mktemp("bert")))


def close(scores: Any, expected: Any) -> bool:
    return np.shape(scores) == np.shape(expected) and np.allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_pool_scores_as_a_cross_encoder_whoever_asks_at_once(backend: str, bert: str, make_pool: MakePool) -> None:
    expected = models.load(bert, "cpu").predict(PAIRS).reshape(len(QUERIES), len(DOCUMENTS))
    assert np.std(expected) > 1e-2
    with (
        make_pool(ModelSpec(bert, backend=backend), batch_tokens=256) as pool,
        ThreadPoolExecutor(len(QUERIES)) as agents,
    ):
        assert {worker.dtype for worker in pool.workers()} == {"float32"}
        for _ in range(3):
            found = agents.map(lambda query: pool.predict([(query, document) for document in DOCUMENTS]), QUERIES)
            assert close(np.stack(list(found)), expected)


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_architecture(backend: str, family: str, tmp_path: Path) -> None:
    if backend == "openvino" and family in (models.LOGIT_SCORE, "mistral", "gemma", "gemma2", "gemma3"):
        pytest.skip("OpenVINO makes NaN of tokens that may attend to none, which the proof finds")
    folder = models.build(family, tmp_path)
    engine = Engine(ModelSpec(folder, backend=backend), "cpu", 1, 256)
    assert close(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS))
    held = sum(parameter.untyped_storage().nbytes() for parameter in engine.model.model.parameters())
    assert held < engine.weights_bytes / 10, "the torch weights are no longer needed"


def test_three_labels_and_a_shorter_max_length(backend: str, tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path, 3)
    expected = models.load(folder, "cpu", max_length=16).predict(PAIRS)
    assert expected.shape == (len(PAIRS), 3)
    engine = Engine(ModelSpec(folder, backend=backend, max_length=16), "cpu", 1, 256)
    assert close(engine.predict(PAIRS), expected)


@pytest.mark.parametrize(("backend", "dtype"), [("onnx", "int8"), ("openvino", "int8"), ("openvino", "bfloat16")])
def test_fewer_bits_rank_much_alike(backend: str, dtype: str, make_pool: MakePool) -> None:
    need(*NEEDS[backend], *(["nncf"] if (backend, dtype) == ("openvino", "int8") else []))
    from mp_rerank._engine.backends.calibration import TEXTS

    pairs = [(query, text) for query in TEXTS for text in TEXTS.values()]
    expected = models.load(ModelSpec().path, "cpu").predict(pairs).reshape(len(TEXTS), -1)
    with make_pool(ModelSpec(backend=backend, dtype=dtype)) as pool:
        assert {worker.dtype for worker in pool.workers()} == {dtype}
        scores = pool.predict(pairs).reshape(len(TEXTS), -1)
    assert (scores.argmax(axis=1) == expected.argmax(axis=1)).mean() >= 0.9
    assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.97
    assert np.abs(scores - expected).max() > 1e-4, "it is float32 after all"


def test_a_network_converted_wrongly_is_found_out(
    backend: str, bert: str, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = import_module(f"mp_rerank._engine.backends.{backend}")
    convert = runtime.convert

    def convert_wrongly(*arguments: Any) -> Any:
        run = convert(*arguments)
        return lambda inputs: run(inputs) * 1.01

    monkeypatch.setattr(runtime, "convert", convert_wrongly)
    with pytest.raises(ModelLoadError, match="the converted network scores"):
        make_pool(ModelSpec(bert, backend=backend), isolation="thread").start()


@pytest.mark.parametrize(
    ("backend", "dtype", "missing"),
    [
        ("onnx", None, "onnxruntime"),
        ("onnx", "int8", "onnx"),
        ("openvino", None, "openvino"),
        ("openvino", "int8", "nncf"),
    ],
)
def test_a_missing_extra_is_named(
    backend: str, dtype: str | None, missing: str, bert: str, make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = (*NEEDS[backend], "nncf")
    need(*needed[: needed.index(missing)])  # they are looked for in this order
    monkeypatch.setitem(sys.modules, missing, None)
    spec = ModelSpec(bert, backend=backend, dtype=dtype)
    with pytest.raises(ModelLoadError, match=rf"needs {missing}: pip install 'mp-rerank\[{backend}\]'"):
        make_pool(spec, isolation="thread").start()


@pytest.mark.skipif(not models.has_logit_score(), reason="this sentence-transformers has no such models")
def test_what_a_runtime_cannot_take_is_said_before_a_worker_starts(tmp_path: Path, make_pool: MakePool) -> None:
    models.build(models.LOGIT_SCORE, tmp_path)
    with pytest.raises(ValueError, match=r"openvino.* computes NaN for Qwen3ForCausalLM.*backend='onnx'"):
        make_pool(ModelSpec(str(tmp_path / "bare"), backend="openvino")).start()
