"""Layers that are computed as a whole score as they do part by part, or they are left as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from test_prepack import PAIRS, always  # noqa: E402, F401
from test_unpad import needs_interface  # noqa: E402

from mp_rerank._engine import whole_layers  # noqa: E402
from mp_rerank._engine.amx.library import why_not  # noqa: E402
from mp_rerank._engine.attention import Rule  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.unpad import _find_encoder, _layers  # noqa: E402
from mp_rerank._engine.whole_layers import _Layer  # noqa: E402

pytestmark = [
    pytest.mark.real,
    needs_interface,
    pytest.mark.usefixtures("always"),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]
FAMILIES = ("bert", "roberta", "xlm-roberta", "electra", "modernbert", "ettin")


def whole(engine: Engine) -> list[Any]:
    """For each layer what computes it as a whole, or ``None``."""
    layers = _layers(_find_encoder(engine.model.model.base_model))
    found = (vars(layer).get("forward") for layer in layers)
    return [layer if isinstance(layer, _Layer) else None for layer in found]


def load(folder: str, dtype: str = "float32", **options: Any) -> Engine:
    return Engine(ModelSpec(folder, dtype=dtype, **options), "cpu", None, 256)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_parts(family: str, dtype: str, tmp_path: Path) -> None:
    """For batches of many sizes, one after the other, as memory is left from one layer to the next."""
    folder = models.build(family, tmp_path)
    engine = load(folder, dtype).optimize()
    assert "whole_layers" in engine.recipe.names(), engine._off
    first, last = whole(engine)
    assert first.used
    assert last is None, "the head reads some of its tokens only"
    parts = load(folder, dtype).optimize(replace(engine.recipe, whole_layers=False))
    assert whole(parts) == [None, None]
    for count in (len(PAIRS), 1, 5, 2, len(PAIRS)):
        first.used = False
        np.testing.assert_array_equal(engine.predict(PAIRS[:count]), parts.predict(PAIRS[:count]))
        assert first.used


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_many_layers_share_memory_whatever_was_in_it(
    family: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.build(family, tmp_path, layers=5)
    engine = load(folder, dtype).optimize()
    assert [bool(layer) for layer in whole(engine)] == [True] * 4 + [False]
    parts = load(folder, dtype).optimize(replace(engine.recipe, whole_layers=False))
    made: list[Any] = []
    for kind in (whole_layers._BertLayer, whole_layers._ModernBertLayer):

        def memory(self: Any, states: Any, plain: Any = kind._memory) -> Any:
            made.append(plain(self, states))
            for buffer in made[-1].values():
                buffer[:] = float("nan")
            return made[-1]

        monkeypatch.setattr(kind, "_memory", memory)
    np.testing.assert_array_equal(engine.predict(PAIRS), parts.predict(PAIRS))
    made.clear()
    engine.predict(PAIRS[:1])
    assert len(made) == 1, "for all layers of a batch"


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_every_layer_but_the_last_is_whole_without_what_only_the_head_needs(family: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    recipe = load(folder).optimize().recipe
    engine = load(folder).optimize(replace(recipe, head_only=False))
    assert [bool(layer) for layer in whole(engine)] == [True, False]
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_layer_that_is_asked_for_something_else_does_what_it_did(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(models.build(family, tmp_path)).optimize()
    expected = engine.predict(PAIRS)
    first, _ = whole(engine)
    first.used = False
    monkeypatch.setattr(Rule, "band", lambda rule: None)  # a mask that the kernel knows nothing of
    np.testing.assert_allclose(engine.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert not first.used


@pytest.mark.parametrize("part", ["attention", "intermediate", "output.LayerNorm"])
def test_a_layer_with_a_hook_in_it_is_computed_by_its_parts(part: str, tmp_path: Path) -> None:
    """What only listens changes no score, and would hear nothing."""
    engine = load(models.build("bert", tmp_path))
    seen: list[Any] = []
    for layer in engine.model.model.bert.encoder.layer:
        layer.get_submodule(part).register_forward_hook(lambda module, input, output: seen.append(module))
    engine.optimize()
    assert whole(engine) == [None, None]
    assert "whole_layers" not in engine.recipe.names()
    seen.clear()
    engine.predict(PAIRS[:2])
    assert len(seen) >= 2


@pytest.mark.parametrize("family", ["albert", "distilbert", "qwen3"])
def test_other_layers_are_left_as_they_are(family: str, tmp_path: Path) -> None:
    engine = load(models.build(family, tmp_path)).optimize()
    assert "whole_layers" not in engine.recipe.names()
    assert "no layers of BERT" in engine._off["whole_layers"]


def test_layers_without_kernels_are_left_as_they_are(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    assert "whole_layers" not in load(folder, prepack=False).optimize().recipe.names()
    assert "whole_layers" not in load(folder, unpad=False).optimize().recipe.names()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize("why", ["scores would differ", "not called as is known here"])
def test_layers_that_are_not_what_they_seem_are_undone(
    why: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.build(family, tmp_path)
    for kind in (whole_layers._BertLayer, whole_layers._ModernBertLayer):
        result = (lambda self, states, *rest: states * 1.5) if "differ" in why else (lambda self, *rest: None)
        monkeypatch.setattr(kind, "_compute", result)
    engine = load(folder).optimize()
    assert whole(engine) == [None, None]
    assert why in engine._off["whole_layers"]
    layer = _layers(_find_encoder(engine.model.model.base_model))[0]
    assert ("forward" in vars(layer)) == (family == "modernbert"), "what it was before"
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)
