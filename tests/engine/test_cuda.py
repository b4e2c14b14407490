"""On a GPU: the same scores, as many workers as are asked for, and nothing of it in the parent.

Run where there is one; `pytest -m real --cross-encoder-device cuda` has the other tests of real models use it too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE

from mp_rerank import ModelSpec, RerankerPool
from mp_rerank.config import BUILTIN_FOLDER

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
pytestmark = [pytest.mark.real, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")]

MakePool = Callable[..., RerankerPool]

PAIRS = [(query, document) for query in models.TEXT[:4] for document in models.TEXT]
BUILTIN = str(BUILTIN_FOLDER)

# What a user's program does, in a process where nothing has imported torch.
PROGRAM = """
import json, subprocess, sys
from mp_rerank import RerankerPool

with RerankerPool() as pool:
    best = pool.rerank("How many people live in Berlin?", ["Berlin has 3.8 million inhabitants.", "A museum."])[0]
    workers = [(worker.device, worker.pid) for worker in pool.workers()]
    question = ["nvidia-smi", "--query-compute-apps=pid", "--format=csv,noheader"]
    using = subprocess.run(question, capture_output=True, text=True).stdout.split()
print(json.dumps({"best": best.index, "workers": workers, "torch": "torch" in sys.modules, "using": using}))
"""


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """What one ``CrossEncoder`` on the GPU makes of PAIRS."""
    return models.load(BUILTIN, "cuda").predict(PAIRS)


def test_without_a_word_about_devices_every_gpu_gets_a_worker_and_the_parent_never_imports_torch() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=PATIENCE, check=True)
    found = json.loads(done.stdout)
    assert found["best"] == 0
    assert {device for device, _ in found["workers"]} == {f"cuda:{i}" for i in range(torch.cuda.device_count())}
    assert not found["torch"]


def test_scores_are_those_of_a_cross_encoder_there_and_nearly_those_of_the_cpu(
    make_pool: MakePool, expected: np.ndarray
) -> None:
    pool = make_pool(BUILTIN, devices="cuda")
    assert np.allclose(pool.submit_pairs(PAIRS).result(PATIENCE), expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(models.load(BUILTIN, "cpu").predict(PAIRS), expected, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_what_the_model_is_in_and_near_float32(
    make_pool: MakePool, expected: np.ndarray, dtype: str
) -> None:
    pool = make_pool(ModelSpec(BUILTIN, dtype=dtype), devices="cuda", workers=1)
    scores = pool.submit_pairs(PAIRS).result(PATIENCE)
    assert pool.workers()[0].dtype == dtype
    assert np.abs(scores - expected).max() < 0.05
    assert not np.array_equal(scores, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_architecture_scores_as_its_cross_encoder_does_there(family: str, dtype: str, tmp_path: Path) -> None:
    from mp_rerank._engine.engine import Engine

    folder = models.build(family, tmp_path)
    engine = Engine(ModelSpec(folder, dtype=dtype), "cuda", None, 1024).optimize()
    plain = models.load(folder, "cuda", model_kwargs={"torch_dtype": dtype})
    limit = 1e-5 if dtype == "float32" else 3e-2
    for pairs in (PAIRS, PAIRS[:1], PAIRS[::3]):
        np.testing.assert_allclose(engine.predict(pairs), plain.predict(pairs), rtol=limit, atol=limit)
    padded = {"deberta-v2", "gemma2"}  # attention of its own, and with a softcap
    if dtype == "float32":
        padded |= {"modernbert", "gemma3", "mistral", models.MODULAR}  # attention to a window
    assert ("cuda_graphs" in engine.recipe.names()) is (family not in padded), engine._off


def test_graphs_are_right_for_texts_of_any_length_and_number(make_pool: MakePool) -> None:
    """Hundreds of slices, of sizes that share their graphs, each computed while the next is tokenized."""
    pool = make_pool(ModelSpec(BUILTIN, dtype="float16"), devices="cuda", workers=1)
    plain = models.load(BUILTIN, "cuda", model_kwargs={"torch_dtype": "float16"})
    chance = random.Random(0)
    words = " ".join(models.TEXT).split()
    texts = [" ".join(chance.choices(words, k=chance.randint(1, chance.choice((10, 60, 400))))) for _ in range(600)]
    expected = plain.predict([("How many people live in Berlin?", text) for text in texts])

    def ask(number: int) -> None:
        which = random.Random(number).sample(range(len(texts)), 1 + number * 3 % 300)
        pairs = [("How many people live in Berlin?", texts[i]) for i in which]
        scores = pool.submit_pairs(pairs).result(PATIENCE)
        np.testing.assert_allclose(scores, expected[which], atol=0.03)

    with ThreadPoolExecutor(8) as agents:
        list(agents.map(ask, range(100)))
    assert "cuda_graphs" in pool.workers()[0].optimizations


def test_workers_do_without_cudnn_attention_which_plans_anew_for_every_shape_of_a_batch(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec(BUILTIN, activation="models.cudnn_attention"), devices="cuda", workers=1)
    assert pool.submit_pairs(PAIRS[:1]).result(PATIENCE) == [0.0]
    assert torch.backends.cuda.cudnn_sdp_enabled()  # of the process that asks, nothing is changed


def test_a_worker_killed_on_the_gpu_loses_nothing(make_pool: MakePool, expected: np.ndarray) -> None:
    pool = make_pool(BUILTIN, devices="cuda", workers=2, slice_tokens=256, coalesce=False)
    pool.start()

    def ask(number: int) -> Any:
        if number == 20:
            os.kill(pool.workers()[0].pid, signal.SIGKILL)
        return pool.submit_pairs(PAIRS).result(PATIENCE)

    with ThreadPoolExecutor(16) as agents:
        for scores in agents.map(ask, range(60)):
            assert np.allclose(scores, expected, rtol=1e-5, atol=1e-5)
    assert pool.stats().crashes >= 1


def test_the_gpu_that_is_not_there_is_named(make_pool: MakePool) -> None:
    missing = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(Exception, match=missing):
        make_pool(BUILTIN, devices=missing, workers=1).start()
