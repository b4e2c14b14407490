"""Gates, residuals and rotations in fewer passes over memory give what the model's own parts do."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
models = pytest.importorskip("models")
from test_unpad import PAIRS, needs_interface  # noqa: E402

from mp_rerank._engine import fused, prepack  # noqa: E402
from mp_rerank._engine.amx.library import find_library, why_not  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402

needs_kernels = pytest.mark.skipif(find_library() is None, reason=why_not() or "there are kernels")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"),
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape is worth packing, also those too small to gain by it."""
    monkeypatch.setattr(prepack, "_share_of_time", lambda *times: 0.0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tokens", [1, 63, 64, 70, 96])
def test_what_a_product_is_added_to_or_multiplied_with(packed: bool, tokens: int) -> None:
    """Also where the number of tokens is none that oneDNN is given."""
    linear = torch.nn.Linear(8, 4)
    with torch.inference_mode():
        states, other = torch.randn(1, tokens, 8), torch.randn(1, tokens, 4)
        expected = linear(states)
        if packed:
            prepack.PackedLinear(linear).replace()
        torch.testing.assert_close(prepack.times(linear, states, other), expected * other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(prepack.plus(linear, states, other), expected + other, rtol=1e-5, atol=1e-5)


@needs_interface
@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("family", ["bert", "modernbert", "gte", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_are_the_plain_model_s(family: str, dtype: str, tmp_path: Path) -> None:
    if family not in models.FAMILIES:
        pytest.skip("this transformers has no such model")
    folder = models.build(family, tmp_path)
    fewer = Engine(ModelSpec(folder, dtype=dtype), "cpu", None, 256).optimize()
    assert fewer.recipe.fewer_passes
    limit = 1e-5 if dtype == "float32" else 0.05
    expected = models.load(folder, "cpu").predict(PAIRS)
    np.testing.assert_allclose(fewer.predict(PAIRS), expected, rtol=limit, atol=limit)


@needs_interface
@pytest.mark.usefixtures("always")
def test_a_layer_cut_in_two_is_not_kept_as_a_whole(tmp_path: Path) -> None:
    engine = Engine(ModelSpec(models.build("modernbert", tmp_path)), "cpu", None, 256)
    mlp = engine.model.model.model.layers[0].mlp
    whole = weakref.ref(mlp.Wi)
    engine.optimize()
    assert whole() is None
    assert {name for name, _ in mlp.named_children()} >= {"first", "gate", "Wo"}


@needs_interface
def test_parts_that_would_compute_something_else_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("modernbert", tmp_path)
    times = fused.times
    monkeypatch.setattr(fused, "times", lambda *given: 1.01 * times(*given))  # so little passes for rounding at first
    engine = Engine(ModelSpec(folder, prepack=False), "cpu", None, 256).optimize()
    assert not engine.recipe.fewer_passes
    part: Any = engine.model.model.model.layers[0].mlp
    assert part.Wi.out_features == 2 * part.Wo.in_features
    assert "forward" not in vars(part)
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


def changed(network: Any) -> set[str]:
    """The parts of a network that have another ``forward``."""
    return {name for name, part in network.named_modules() if "forward" in vars(part)}


@needs_interface
@needs_kernels
@pytest.mark.parametrize(
    ("family", "parts"),
    [
        ("bert", {"bert.embeddings", "bert.encoder.layer.0.output.LayerNorm"}),
        ("roberta", {"roberta.embeddings"}),
        ("electra", {"electra.embeddings"}),
        ("modernbert", {"model.layers.0", "model.layers.0.mlp_norm", "model.final_norm"}),
        ("qwen3", {"model.layers.0", "model.layers.0.self_attn.q_norm", "model.layers.0.input_layernorm"}),
        ("gemma2", {"model.layers.0.pre_feedforward_layernorm"}),
    ],
)
def test_what_has_a_kernel(family: str, parts: set[str], tmp_path: Path) -> None:
    if family not in models.FAMILIES:
        pytest.skip("this transformers has no such model")
    folder = models.build(family, tmp_path)
    engine = Engine(ModelSpec(folder, prepack=False), "cpu", None, 256).optimize()
    assert parts <= changed(engine.model.model)
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


@needs_interface
@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_without_kernels_torch_computes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "find_library", lambda: None)
    monkeypatch.setattr(fused, "rotate", lambda *given: False)
    folder = models.build(family, tmp_path)
    engine = Engine(ModelSpec(folder, prepack=False), "cpu", None, 256).optimize()
    assert engine.recipe.fewer_passes
    assert not {"model.layers.0", "bert.embeddings.LayerNorm"} & changed(engine.model.model)
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


@needs_interface
@needs_kernels
def test_a_layer_that_adds_otherwise_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Granite's, which have a factor before each sum."""
    folder = models.build("qwen3", tmp_path)
    engine = Engine(ModelSpec(folder, prepack=False), "cpu", None, 256)
    layer: Any = engine.model.model.model.layers[0]
    plain = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda *given, **rest: 0.9 * plain(*given, **rest))
    engine.optimize()
    assert engine.recipe.fewer_passes
    assert "model.layers.0.mlp" in changed(engine.model.model)
    assert "model.layers.0" not in changed(engine.model.model)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("types", [1, 3])
def test_embeddings_of_positions_and_types_are_added_up_once(types: int, dtype: Any) -> None:
    embeddings = embeddings_of(types).to(dtype)
    change = fused._change_of(embeddings)
    assert isinstance(change, fused._EmbeddingsChange)
    with torch.inference_mode():
        asked = {
            "input_ids": torch.randint(50, (1, 20)),
            "token_type_ids": torch.randint(types, (1, 20)),
            "position_ids": torch.randint(20, (1, 20)),
        }
        for given in (asked, {**asked, "token_type_ids": None}, {"input_ids": asked["input_ids"]}):
            expected = embeddings(**given)
            change.apply()
            limit = 1e-5 if dtype is torch.float32 else 2e-2
            torch.testing.assert_close(embeddings(**given), expected, rtol=limit, atol=limit)
            change.undo()
        change.apply()
        for name, beyond in (("input_ids", 50), ("position_ids", 20)):
            with pytest.raises(IndexError):
                embeddings(**{**asked, name: torch.full((1, 20), beyond)})


@needs_kernels
def test_embeddings_that_are_made_otherwise_are_left_as_they_are() -> None:
    embeddings = embeddings_of(2)
    embeddings.word_embeddings = torch.nn.Embedding(50, 32, max_norm=1.0)
    assert fused._change_of(embeddings) is None, "looking a row up would change it"
    embeddings = embeddings_of(2)
    embeddings.register_module("LayerNorm", torch.nn.Identity())
    assert fused._change_of(embeddings) is None
    embeddings = embeddings_of(2)
    plain = embeddings.forward

    def forward(self: Any, input_ids: Any, **given: Any) -> Any:
        return plain(torch.where(input_ids > 40, 0, input_ids), **given)

    embeddings.__class__ = type("Remapped", (type(embeddings),), {"forward": forward})
    assert fused._change_of(embeddings) is None


def embeddings_of(types: int) -> Any:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, max_position_embeddings=20, type_vocab_size=types, num_attention_heads=2
    )
    return transformers.models.bert.modeling_bert.BertEmbeddings(config).eval()
