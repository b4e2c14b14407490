"""A last layer that computes only what the head reads gives the scores of a whole layer, or is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from test_unpad import PAIRS, UNPADDED, needs_interface  # noqa: E402

from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.packed import TOKEN_MULTIPLE  # noqa: E402
from mp_rerank._engine.unpad import head_only, unpad  # noqa: E402

pytestmark = [pytest.mark.real, needs_interface]


def engine(folder: str, **options: Any) -> Engine:
    return Engine(ModelSpec(folder, prepack=False, **options), "cpu", None, 256).optimize()


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", UNPADDED)
def test_scores_are_the_whole_layer_s(family: str, num_labels: int, tmp_path: Path) -> None:
    if family == models.LOGIT_SCORE and num_labels > 1:
        pytest.skip("it has one score a pair")
    folder = models.build(family, tmp_path, num_labels)
    reduced, plain = engine(folder), models.load(folder, "cpu")
    assert reduced.recipe.head_only == (family != "albert"), "ALBERT's layers are one layer"
    for pairs in (PAIRS, PAIRS[:1], PAIRS[:1] * 5, PAIRS[:2]):
        np.testing.assert_allclose(reduced.predict(pairs), plain.predict(pairs), rtol=1e-5, atol=1e-5)


def test_past_the_keys_and_values_there_are_first_tokens_only(tmp_path: Path) -> None:
    reduced = engine(models.build("bert", tmp_path))
    seen: dict[str, int] = {}
    first, last = reduced.model.model.bert.encoder.layer
    for name, part in (
        ("a whole layer", first.intermediate),
        ("keys", last.attention.self.key),
        ("the last layer", last.intermediate),
    ):
        part.register_forward_hook(lambda module, arguments, output, name=name: seen.update({name: output.shape[1]}))
    reduced.predict(PAIRS[:3])
    whole = -(-sum(reduced.readings.tokens) // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    assert seen == {"a whole layer": whole, "keys": whole, "the last layer": 3}


@pytest.mark.parametrize("reads", ["the mean of two", "the second token", "all, and fails without"])
def test_a_head_that_reads_anything_else_gets_it(reads: str, tmp_path: Path) -> None:
    whole = engine(models.build("bert", tmp_path), unpad=False)
    network = whole.model.model
    pooler = network.bert.pooler
    pool = pooler.forward

    def forward(hidden_states: Any) -> Any:
        if reads == "the mean of two":
            return pool(hidden_states[:, :2].mean(1, keepdim=True))
        if reads == "the second token":
            return pool(hidden_states[:, 1:])
        if not hidden_states[:, 1].any():
            raise RuntimeError("where are the others?")
        return pool(hidden_states)

    pooler.forward = forward
    before = whole.predict(PAIRS)
    assert not unpad(network, "float32", lambda: whole.predict(PAIRS[:4]))
    assert head_only(network, "float32", lambda: whole.predict(PAIRS[:4]))
    assert "forward" not in vars(network.bert.encoder.layer[-1])
    np.testing.assert_allclose(whole.predict(PAIRS), before, rtol=1e-5, atol=1e-5)


def test_logits_are_compared_too_where_a_sigmoid_is_flat(tmp_path: Path) -> None:
    whole = engine(models.build("bert", tmp_path), unpad=False, activation="torch.nn.Sigmoid")
    network = whole.model.model
    pool = network.bert.pooler.forward
    network.bert.pooler.forward = lambda hidden_states: pool(hidden_states[:, 1:])
    with torch.no_grad():
        network.classifier.bias.fill_(30.0)
    assert (whole.predict(PAIRS) == 1).all()
    assert not unpad(network, "float32", whole.canary)
    assert head_only(network, "float32", whole.canary)


def test_in_bfloat16_too(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    reduced, whole = engine(folder, dtype="bfloat16"), engine(folder, dtype="bfloat16", unpad=False)
    assert (reduced.recipe.head_only, whole.recipe.head_only) == (True, False)
    np.testing.assert_allclose(reduced.predict(PAIRS), whole.predict(PAIRS), atol=0.05)
