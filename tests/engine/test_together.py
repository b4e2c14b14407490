"""Layers that are computed together score as they do apart, or nothing is packed."""

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

from mp_rerank._engine.amx.library import why_not  # noqa: E402
from mp_rerank._engine.amx.linear import TiledProduct  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.prepack import PackedLinear, prepack  # noqa: E402
from mp_rerank._engine.together import compute_together  # noqa: E402

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("always"),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]


def computed_by(network: Any) -> list[str]:
    """What the packed layers of a network are computed by, each name once, in order."""
    layers = [vars(part).get("forward") for part in network.modules()]
    packed = [layer for layer in layers if isinstance(layer, PackedLinear) and not layer.is_joined]
    names = [getattr(layer.compute, "func", layer.compute) for layer in packed]
    return list(dict.fromkeys(type(getattr(name, "__self__", name)).__name__ for name in names))


@needs_interface
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "xlm-roberta", "modernbert", "qwen3"])
def test_scores_are_those_of_layers_apart(family: str, dtype: str, tmp_path: Path) -> None:
    spec = ModelSpec(models.build(family, tmp_path), dtype=dtype)
    together = Engine(spec, "cpu", None, 256).optimize()
    assert "computes_together" in together.recipe.names()
    kinds = {"_FeedForward"} if family == "modernbert" else {"_FeedForward", "_SideBySide"}
    assert set(computed_by(together.model.model)) == {*kinds, "TiledProduct"}
    apart = Engine(spec, "cpu", None, 256).optimize(replace(together.recipe, computes_together=False))
    assert computed_by(apart.model.model) == ["TiledProduct"]
    np.testing.assert_array_equal(together.predict(PAIRS), apart.predict(PAIRS))


def test_a_network_that_reads_between_two_layers_computes_them_apart(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    engine = Engine(ModelSpec(folder, unpad=False), "cpu", None, 256)
    for layer in engine.model.model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, input, output: output * 1)
    engine.optimize()
    assert engine.recipe.prepacked
    assert not engine.recipe.computes_together
    assert computed_by(engine.model.model) == ["TiledProduct"]
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


def test_a_kernel_that_computes_something_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a canary has too few tokens for it: here there are threads for more rows than it has."""
    feed = TiledProduct.feed
    monkeypatch.setattr(TiledProduct, "feed", lambda *given: feed(*given) * 1.01)
    engine = Engine(ModelSpec(models.build("bert", tmp_path)), "cpu", None, 256).optimize()
    assert engine.recipe.prepacked
    assert not engine.recipe.computes_together


def attention(*depths: int) -> Any:
    module = torch.nn.Module()
    module.query, module.key, module.value = (torch.nn.Linear(depth, 64) for depth in depths)
    return module


def packed(*parts: Any) -> Any:
    model = torch.nn.Sequential(*parts)
    with torch.inference_mode():
        names, _ = prepack(model, "float32", None)
    assert len(names) == 3 * len(parts)
    return model


def test_layers_with_inputs_of_their_own_are_computed_apart_from_then_on() -> None:
    """As in cross-attention, whose keys are of another text than its queries."""
    first = attention(64, 64, 64)
    model = packed(first, attention(64, 64, 64))
    assert compute_together(model, "float32", None) == ""
    assert computed_by(first) == ["_SideBySide"]
    group = first.query.forward.compute.func.__self__
    one, other = torch.randn(100, 64), torch.randn(90, 64)
    layers = (first.query, first.key, first.value)
    wanted = {(layer, x): layer.forward.product(x) for layer in layers for x in (one, other)}
    for layer in layers:
        assert torch.equal(layer(one), wanted[layer, one])
    assert not group._outputs
    for layer, input in ((first.query, one), (first.key, other), (first.value, other), (first.query, other)):
        assert torch.equal(layer(input), wanted[layer, input])
    assert not group._outputs, "nothing is computed that nobody asks for, or kept"


def test_layers_of_other_widths_are_not_computed_at_once() -> None:
    """As MobileBERT's, whose values are made of other states than its queries."""
    model = packed(attention(64, 64, 96), attention(64, 64, 64))
    assert "no layers that stand together" in compute_together(model, "float32", None)
    query, value = model[0].query.forward.product, model[0].value.forward.product
    input = torch.randn(100, 64)
    with pytest.raises(ValueError, match="no input in common"):
        query.side_by_side([value], input)
