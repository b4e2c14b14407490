"""DeBERTa's attention of pairs without padding gives the scores of its own, or is left as it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")

from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = pytest.mark.real

#: from two tokens to the longest: distances with an embedding each, and such as share one
PAIRS = [("a", "b"), *((models.TEXT[0], text) for text in models.TEXT), ("long " * 40, "text " * 300)]


def build(folder: Path, **settings: Any) -> str:
    """A DeBERTa of these settings, with random weights where they want other ones."""
    models.build("deberta-v2", folder)
    config = folder / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    if settings:
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        read = transformers.AutoConfig.from_pretrained(folder)
        transformers.DebertaV2ForSequenceClassification(read).save_pretrained(folder)
    return str(folder)


def engine(folder: str, **options: Any) -> Engine:
    return Engine(ModelSpec(folder, **options), "cpu", None, 256).optimize()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"share_att_key": False},  # projections of their own for distances
        {"position_buckets": -1, "max_relative_positions": 24},  # no logarithm, but a farthest distance
        {"norm_rel_ebd": "none", "position_biased_input": True},
    ],
)
def test_scores_are_its_own(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build(tmp_path, **settings)
    unpadded, plain = engine(folder), models.load(folder, "cpu")
    assert {"unpadded", "fewer_passes", "head_only"} <= set(unpadded.recipe.names())
    for pairs in (PAIRS, PAIRS[:1], PAIRS[-1:], PAIRS[1:2] * 3):
        np.testing.assert_allclose(unpadded.predict(pairs), plain.predict(pairs), rtol=1e-5, atol=1e-5)


def test_in_bfloat16(tmp_path: Path) -> None:
    folder = build(tmp_path)
    unpadded, padded = engine(folder, dtype="bfloat16"), engine(folder, dtype="bfloat16", unpad=False)
    assert (unpadded.recipe.unpadded, padded.recipe.unpadded) == (True, False)
    np.testing.assert_allclose(unpadded.predict(PAIRS), padded.predict(PAIRS), atol=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        {"conv_kernel_size": 3},  # a token sees its neighbours in the row
        {"pos_att_type": ["c2p"]},
    ],
)
def test_one_of_another_kind_is_left_as_it_was(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = build(tmp_path, **settings)
    padded, plain = engine(folder, prepack=False), models.load(folder, "cpu")
    assert not padded.recipe.unpadded
    assert not [part for part in padded.model.model.modules() if "forward" in vars(part)]
    np.testing.assert_allclose(padded.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)


def test_one_that_would_score_otherwise_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *states, **rest: 1.5 * attend(*states, **rest)
    )
    folder = build(tmp_path)
    padded, plain = engine(folder, prepack=False), models.load(folder, "cpu")
    assert not padded.recipe.unpadded
    encoder = padded.model.model.deberta.encoder
    assert not {"get_attention_mask", "get_rel_pos", "forward"} & vars(encoder).keys()
    assert not [part for part in padded.model.model.modules() if "forward" in vars(part)]
    np.testing.assert_allclose(padded.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)
