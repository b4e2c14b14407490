"""Layers that are computed together score as they do apart, or nothing is packed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from test_prepack import PAIRS, always  # noqa: E402, F401
from test_unpad import needs_interface  # noqa: E402

from mp_rerank._engine import together  # noqa: E402
from mp_rerank._engine.amx.library import why_not  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = [
    pytest.mark.real,
    pytest.mark.usefixtures("always"),
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of groups that a model is found to have, in order."""
    found = []
    for kind in (together._FeedForward, together._SideBySide):

        def note(self: Any, *layers: Any, kind: Any = kind, begin: Any = kind.__init__) -> None:
            found.append(kind.__name__)
            begin(self, *layers)

        monkeypatch.setattr(kind, "__init__", note)
    return found


@needs_interface
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("family", "feed_forward", "side_by_side"),
    [("bert", 2, 1), ("distilbert", 2, 1), ("xlm-roberta", 2, 1), ("modernbert", 2, 0), ("qwen3", 2, 1)],
)
def test_scores_are_those_of_layers_apart(
    family: str,
    feed_forward: int,
    side_by_side: int,
    dtype: str,
    kinds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spec = ModelSpec(models.build(family, tmp_path), dtype=dtype)
    joined = Engine(spec, "cpu", None, 256).optimize()
    assert joined.recipe.prepacked
    assert kinds == ["_FeedForward"] * feed_forward + ["_SideBySide"] * side_by_side
    for table in ("FEED_FORWARD", "GATED_FEED_FORWARD", "SIDE_BY_SIDE"):
        monkeypatch.setattr(together, table, ())
    apart = Engine(spec, "cpu", None, 256).optimize()
    np.testing.assert_array_equal(joined.predict(PAIRS), apart.predict(PAIRS))


def test_a_network_that_reads_between_two_layers_is_not_packed(kinds: list[str], tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    engine = Engine(ModelSpec(folder, unpad=False), "cpu", None, 256)
    for layer in engine.model.model.bert.encoder.layer:
        layer.intermediate.register_forward_hook(lambda module, input, output: output * 1)
    engine.optimize()
    assert "_FeedForward" in kinds
    assert not engine.recipe.prepacked
    np.testing.assert_allclose(engine.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), rtol=1e-5, atol=1e-5)


def test_another_input_is_computed_as_it_comes() -> None:
    """A layer that was called with others of its group may be called alone, and again."""
    layers = [torch.nn.Linear(64, 64) for _ in range(3)]
    holder = torch.nn.Module()
    holder.query, holder.key, holder.value = layers
    last = torch.nn.Module()
    last.query, last.key, last.value = (torch.nn.Linear(64, 64) for _ in range(3))
    model = torch.nn.Sequential(holder, last)

    from mp_rerank._engine import prepack

    with torch.inference_mode():
        one, other = torch.randn(40, 64), torch.randn(50, 64)
        wanted = {(which, len(x)): layer(x) for which, layer in enumerate(layers) for x in (one, other)}
        names, _ = prepack.prepack(model, "float32", None)
        assert len(names) == 6
        for which, input in ((0, one), (1, other), (2, other), (2, one), (0, one), (1, one), (1, one), (0, other)):
            found = layers[which](input)
            torch.testing.assert_close(found, wanted[which, len(input)], rtol=1e-5, atol=1e-5)
