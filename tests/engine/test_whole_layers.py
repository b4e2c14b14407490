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
from mp_rerank._engine.together import _Group  # noqa: E402
from mp_rerank._engine.unpad import encoder_layers  # noqa: E402
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
    found = (vars(layer).get("forward") for layer in encoder_layers(engine.model.model))
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

        def memory(self: Any, states: Any, count: int, plain: Any = kind._memory) -> Any:
            made.append(plain(self, states, count))
            for buffer in made[-1].values():
                buffer[:count] = float("nan")
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
    if family != "albert":  # whose one layer is not computed together either
        assert "no layers of BERT" in engine._off["whole_layers"]


def test_layers_without_kernels_are_left_as_they_are(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    assert "whole_layers" not in load(folder, prepack=False).optimize().recipe.names()
    assert "whole_layers" not in load(folder, unpad=False).optimize().recipe.names()


@pytest.mark.parametrize("family", ["bert", "modernbert"])
@pytest.mark.parametrize(
    ("result", "proved", "why"),
    [
        (lambda self, states, *rest: states * 1.001, False, "other numbers"),
        (lambda self, states, *rest: states * 1.5, True, "scores would differ"),
        (lambda self, *rest: None, True, "not called as is known here"),
    ],
)
def test_layers_that_are_not_what_they_seem_are_undone(
    result: Any, proved: bool, why: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.build(family, tmp_path)
    for kind in (whole_layers._BertLayer, whole_layers._ModernBertLayer):
        monkeypatch.setattr(kind, "_compute", result)
    if proved:
        monkeypatch.setattr(_Layer, "prove", lambda self: None)
    engine = load(folder).optimize()
    assert whole(engine) == [None, None]
    assert why in engine._off["whole_layers"]
    layer = encoder_layers(engine.model.model)[0]
    assert ("forward" in vars(layer)) == (family == "modernbert"), "what it was before"
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


def more(layer: Any) -> None:
    """A kind of its own, which does a little more."""
    kind = type(layer)
    layer.__class__ = type(
        "More", (kind,), {"forward": lambda self, *given, **rest: kind.forward(self, *given, **rest) * 1.01}
    )


def patched(layer: Any) -> None:
    plain = layer.forward
    layer.forward = lambda *given, **rest: plain(*given, **rest)


def without_scaling(layer: Any) -> None:
    layer.attention.self.scaling = None


@pytest.mark.parametrize("change", [more, patched, without_scaling], ids=lambda f: f.__name__)
def test_a_layer_that_is_built_otherwise_is_left_as_it_is(change: Any, tmp_path: Path) -> None:
    """In bfloat16, where scores would hardly show it."""
    engine = load(models.build("bert", tmp_path), "bfloat16")
    layer = encoder_layers(engine.model.model)[0]
    change(layer)
    forward = vars(layer).get("forward")
    engine.optimize()
    assert whole(engine) == [None, None]
    assert vars(layer).get("forward") is forward


def test_kernels_that_were_refused_are_not_used_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        raise ValueError("they differ when they are computed together")

    monkeypatch.setattr(_Group, "prove", fail)
    engine = load(models.build("bert", tmp_path)).optimize()
    assert engine.recipe.amx
    assert not engine.recipe.whole_layers
    assert whole(engine) == [None, None]


@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_a_pair_without_tokens_has_the_score_that_it_had(family: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path, layers=4)
    engine = load(folder).optimize()
    parts = load(folder).optimize(replace(engine.recipe, whole_layers=False))
    ids = torch.randint(5, 200, (3, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2] = 0
    with torch.inference_mode():
        found, expected = (one.model.model(input_ids=ids, attention_mask=mask).logits for one in (engine, parts))
    assert torch.equal(found, expected)


def test_who_listens_to_a_layer_later_hears_each_one_s_numbers(tmp_path: Path) -> None:
    engine = load(models.build("bert", tmp_path, layers=4)).optimize()
    seen: list[Any] = []
    for layer in encoder_layers(engine.model.model):
        layer.register_forward_hook(lambda module, input, output: seen.append(output))
    engine.predict(PAIRS[:1])
    first, second, third, _ = (output.clone() for output in seen)
    assert not any(torch.equal(one, other) for one, other in ((first, second), (second, third), (first, third)))
