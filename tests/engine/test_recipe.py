"""Prove once: what one worker has found, the next one applies, and computes the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import models
from test_unpad import PAIRS, needs_interface

from mp_rerank import ModelSpec
from mp_rerank._engine import parity, prepack
from mp_rerank._engine.engine import Engine
from mp_rerank._recipe import Recipe

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer is worth packing here, as small as the tests' are."""
    monkeypatch.setattr(prepack, "_share_of_time", lambda *times: 0.0)


def engine(folder: str, **options: Any) -> Engine:
    return Engine(ModelSpec(folder, **options), "cpu", None, 256)


@needs_interface
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recipe_makes_the_next_worker_the_same_without_proofs(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(models.build("bert", tmp_path))
    first = engine(folder, dtype=dtype).optimize()
    assert first.recipe.unpadded
    assert first.recipe.pipeline

    def no_proof(*_: object) -> float:
        raise AssertionError("nothing is timed")

    forwards: list[int] = []
    second = engine(folder, dtype=dtype)
    monkeypatch.setattr(prepack, "_share_of_time", no_proof)
    monkeypatch.setattr(parity.np, "allclose", no_proof)  # scores are not compared either
    network = type(second.model.model)
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda *args, **rest: forwards.append(1) or forward(*args, **rest))
    second.optimize(first.recipe)
    assert second.recipe == first.recipe
    assert forwards == []
    monkeypatch.undo()
    np.testing.assert_array_equal(second.predict(PAIRS), first.predict(PAIRS))


def test_an_empty_recipe_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    folder = str(models.build("bert", tmp_path))
    plain = engine(folder).optimize(Recipe())
    assert plain.recipe == Recipe()
    fast = engine(folder).optimize()
    assert fast.recipe != Recipe()
    np.testing.assert_allclose(plain.predict(PAIRS), fast.predict(PAIRS), rtol=1e-5, atol=1e-5)
