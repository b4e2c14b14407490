"""Prepacked layers give the scores that plain ones do, or are not used at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from test_unpad import needs_interface  # noqa: E402

from mp_rerank._engine import prepack as module  # noqa: E402
from mp_rerank._engine.amx.library import find_library, why_not  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"),
]

PAIRS = [(query, document) for query in models.TEXT[:3] for document in (*models.TEXT, "", "long " * 300)]
#: whose activations have no layer of their own before them: a part of its output, or one that all layers share
NOT_FUSED = ("modernbert", "albert")


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape is worth packing, also those too small to gain by it."""
    monkeypatch.setattr(module, "_share_of_time", lambda *times: 0.0)


@pytest.fixture(params=["oneDNN", "amx"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What computes the products: both are to be right on a CPU that has both."""
    if request.param == "oneDNN":
        monkeypatch.setattr(module, "find_library", lambda: None)
    elif not find_library():
        pytest.skip(why_not())
    return str(request.param)


def engine(folder: str, dtype: str | None = None) -> Engine:
    return Engine(ModelSpec(folder, dtype=dtype, unpad=False), "cpu", None, 256).optimize()


def replaced(network: Any) -> list[Any]:
    return [part for part in network.modules() if "forward" in vars(part)]


def plain_linears(network: Any) -> Iterator[Any]:
    return (part for part in network.modules() if type(part) is torch.nn.Linear and "forward" not in vars(part))


def test_products_of_many_tokens_are_of_a_multiple_of_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Since oneDNN keeps a kernel for each number of tokens: there must not be any number of them."""
    linear = torch.nn.Linear(8, 4)
    packed = module._OneDnnProduct(linear.weight.detach(), linear.bias.detach(), "")
    product, seen = packed._product, []
    monkeypatch.setattr(packed, "_product", lambda input: seen.append(input.shape[:-1].numel()) or product(input))
    with torch.inference_mode():
        for shape in ((1, 8), (3, 21, 8), (5, 13, 8), (4, 16, 8), (8,), (2, 3, 100, 8), (0, 8)):
            input = torch.randn(shape)
            torch.testing.assert_close(packed(input), linear(input), rtol=1e-5, atol=1e-5)
    assert seen == [1, 63, 96, 64, 1, 608, 0], "65 became 96, and 600 became 608; few are left as they are"


def test_a_layer_is_timed_with_the_activation_that_it_would_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the products alone are no faster, the activation within them may still be."""
    shapes = []

    def like_with_like(packed: Any, plain: Any, input: Any) -> float:
        for one, other in zip(packed, plain, strict=True):
            torch.testing.assert_close(one(input), other(input), rtol=1e-5, atol=1e-5)
            shapes.append(len(other))
        return 0.0

    monkeypatch.setattr(module, "_share_of_time", like_with_like)
    engine(models.build("bert", tmp_path))
    assert sorted(set(shapes)) == [1, 2]


@pytest.mark.usefixtures("always", "way")
@pytest.mark.parametrize("family", [*models.ENCODERS, *models.DECODERS])
def test_scores_are_the_plain_model_s(family: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    packed, plain = engine(folder), models.load(folder, "cpu")
    assert len(packed.recipe.prepacked) > 6
    assert not list(plain_linears(packed.model.model))
    assert len(replaced(packed.model.model)) == len(packed.recipe.prepacked) + (0 if family in NOT_FUSED else 2)
    np.testing.assert_allclose(packed.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("family", "gates"), [pytest.param("modernbert", "gate", marks=needs_interface), ("qwen3", "up_proj")]
)
def test_a_gate_is_computed_with_what_it_opens(way: str, family: str, gates: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    packed, plain = Engine(ModelSpec(folder), "cpu", None, 256).optimize(), models.load(folder, "cpu")
    joined = [getattr(part, gates).forward.is_joined for part in packed.model.modules() if hasattr(part, gates)]
    assert joined == [way == "amx"] * len(joined) != []
    np.testing.assert_allclose(packed.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("supported", [False, True])
def test_in_bfloat16_it_is_all_or_none(supported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is measured: workers that chose differently would score differently."""
    if supported and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for bfloat16")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    monkeypatch.setattr(module, "_share_of_time", None)
    folder = models.build("bert", tmp_path)
    packed = Engine(ModelSpec(folder, dtype="bfloat16", unpad=False, prepack=False), "cpu", None, 256)
    names, why_not = module.prepack(packed.model.model, "bfloat16", None)
    assert why_not == ("" if supported else "no layer is faster")
    assert bool(list(plain_linears(packed.model.model))) != supported
    assert (len(names) > 0) == supported
    np.testing.assert_allclose(packed.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), atol=0.05)


@pytest.mark.usefixtures("always")
def test_a_packed_weight_takes_no_memory_twice(way: str, tmp_path: Path) -> None:
    packed = engine(models.build("bert", tmp_path)).model.model
    layer = packed.bert.encoder.layer[0].intermediate.dense
    weight = layer.weight
    assert weight.shape == (64, 32)
    assert weight.untyped_storage().nbytes() == weight.element_size()
    assert weight.isnan().all(), "whoever reads it should not mistake it for the weight"
    owners = layer.forward, layer.forward.product
    held = [part for owner in owners for part in vars(owner).values() if isinstance(part, torch.Tensor)]
    assert sum(part.numel() >= weight.numel() for part in held) == 1, "the packed one, and not the plain one as well"


def test_layers_that_are_not_faster_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_share_of_time", lambda *times: 1.0)
    plain = engine(models.build("bert", tmp_path))
    assert len(plain.recipe.prepacked) == 0
    assert not replaced(plain.model.model)


@pytest.mark.usefixtures("always")
def test_layers_that_compute_something_else_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("bert", tmp_path)
    multiply = module.PackedLinear.__call__
    monkeypatch.setattr(module.PackedLinear, "__call__", lambda self, input, *rest: 1.01 * multiply(self, input, *rest))
    plain = engine(folder)
    assert len(plain.recipe.prepacked) == 0
    assert not replaced(plain.model.model)
    np.testing.assert_allclose(plain.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), atol=1e-6)


@pytest.mark.usefixtures("always")
def test_layers_that_cannot_be_packed_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("bert", tmp_path)

    def fail(self: Any, input: Any) -> None:
        raise RuntimeError("no such operator")

    monkeypatch.setattr(module.PackedLinear, "__call__", fail)
    plain = engine(folder)
    assert len(plain.recipe.prepacked) == 0
    np.testing.assert_allclose(plain.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), atol=1e-6)


@pytest.mark.usefixtures("always")
def test_a_weight_that_another_layer_reads_stays(tmp_path: Path) -> None:
    network = models.load(models.build("bert", tmp_path), "cpu")
    layers = network.model.bert.encoder.layer
    layers[1].output.dense.weight = layers[0].output.dense.weight
    before = network.predict(PAIRS)
    assert module.prepack(network, "float32", lambda: network.predict(PAIRS[:4]))[0]
    assert not layers[0].output.dense.weight.isnan().any()
    np.testing.assert_allclose(network.predict(PAIRS), before, rtol=1e-5, atol=1e-5)
