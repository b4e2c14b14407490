"""Encoders that compute no padding give the scores that padded ones do, or are left as they were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine import attention as module  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.packed import TOKEN_MULTIPLE  # noqa: E402
from mp_rerank._engine.unpad import packing_forward  # noqa: E402

pytestmark = pytest.mark.real

PAIRS = [(query, document) for query in models.TEXT[:3] for document in (*models.TEXT, "", "long " * 300)]
#: older versions' sdpa takes no notice of Gemma 2's softcap, and ours does
LEFT_ALONE = () if models.ATTENTION_IS_OPEN else tuple({"gemma2", *models.ENCODERS} - {"deberta-v2"})
UNPADDED = tuple(family for family in models.FAMILIES if family not in LEFT_ALONE)
needs_interface = pytest.mark.skipif(
    not models.ATTENTION_IS_OPEN, reason="this transformers' BERT has an attention of its own"
)


def engine(folder: str, **options: Any) -> Engine:
    return Engine(ModelSpec(folder, prepack=False, **options), "cpu", None, 256).optimize()


def left_alone(network: Any) -> bool:
    return network.config._attn_implementation == "sdpa" and not [
        part for part in network.modules() if "forward" in vars(part)
    ]


@pytest.mark.parametrize("num_labels", [1, 3])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_scores_are_the_padded_model_s(family: str, num_labels: int, tmp_path: Path) -> None:
    if family == models.LOGIT_SCORE and num_labels > 1:
        pytest.skip("it has one score a pair")
    folder = models.build(family, tmp_path, num_labels)
    unpadded, plain = engine(folder), models.load(folder, "cpu")
    assert unpadded.recipe.unpadded == (family in UNPADDED)
    for pairs in (PAIRS, PAIRS[:1], PAIRS[:1] * 5, PAIRS[:2]):
        np.testing.assert_allclose(unpadded.predict(pairs), plain.predict(pairs), rtol=1e-5, atol=1e-5)


@needs_interface
def test_a_decoder_whose_tokens_attend_to_later_ones_too(tmp_path: Path) -> None:
    """As nemotron's rerankers: Llama, and not causal."""
    folder = models.build("llama", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_causal": False}))
    unpadded, plain = engine(folder), models.load(folder, "cpu")
    assert unpadded.recipe.unpadded
    np.testing.assert_allclose(unpadded.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)


@needs_interface
def test_no_layer_sees_padding_but_what_fills_a_row_up(tmp_path: Path) -> None:
    """To a multiple of 32 tokens: oneDNN keeps a kernel for each number of them."""
    unpadded = engine(models.build("bert", tmp_path))
    seen: list[tuple[int, ...]] = []
    for layer in unpadded.model.model.bert.encoder.layer:
        layer.register_forward_pre_hook(lambda module, arguments: seen.append(tuple(arguments[0].shape)))
    unpadded.predict(PAIRS)
    assert {len(shape) for shape in seen} == {3}
    assert {shape[0] for shape in seen} == {1}
    assert {shape[1] % TOKEN_MULTIPLE for shape in seen} == {0}
    more = sum(shape[1] for shape in seen) - 2 * sum(unpadded.readings.tokens)  # two layers
    assert 0 < more < TOKEN_MULTIPLE * len(seen)


@needs_interface
def test_attention_pads_pairs_to_full_vector_registers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take twice as long for one that is not full. Nothing attends to that padding."""
    unpadded = engine(models.build("bert", tmp_path))
    packing = packing_forward(unpadded.model.model)
    assert packing is not None
    packing.in_tiles = False  # the kernel for CPUs with AMX needs no padding
    lengths = unpadded._pipeline.tokenize(PAIRS).lengths
    attend, seen = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query: Any, key: Any, value: Any, **options: Any) -> Any:
        seen.append((key.shape[2], 0 if options["attn_mask"] is None else int(options["attn_mask"].isinf().sum())))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    unpadded.predict(PAIRS)
    assert {padded_length % 16 for padded_length, _ in seen} == {0}  # AVX-512's floats
    layers = len(unpadded.model.model.bert.encoder.layer)
    assert sum(padding for _, padding in seen) == layers * sum(-length % 16 for length in lengths)


@needs_interface
def test_in_bfloat16_too(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    unpadded, padded = engine(folder, dtype="bfloat16"), engine(folder, dtype="bfloat16", unpad=False)
    assert (unpadded.recipe.unpadded, padded.recipe.unpadded) == (True, False)
    assert left_alone(padded.model.model)
    np.testing.assert_allclose(unpadded.predict(PAIRS), padded.predict(PAIRS), atol=0.05)


@needs_interface
@pytest.mark.parametrize("fails", [False, True])
def test_an_encoder_that_would_score_otherwise_is_put_back(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = models.build("bert", tmp_path)
    attend = module._attend

    def wrong(*arguments: Any, **options: Any) -> Any:
        if fails:
            raise RuntimeError("no such operator")
        return 1.01 * attend(*arguments, **options)[0], None

    monkeypatch.setattr(module, "_attend", wrong)
    padded = engine(folder)
    assert not padded.recipe.unpadded
    assert left_alone(padded.model.model)
    np.testing.assert_allclose(padded.predict(PAIRS), models.load(folder, "cpu").predict(PAIRS), atol=1e-6)


@needs_interface
def test_other_attention_is_left_alone(tmp_path: Path) -> None:
    """Whoever asks for an attention gets that one."""
    chosen = engine(models.build("bert", tmp_path), model_kwargs={"attn_implementation": "eager"})
    assert not chosen.recipe.unpadded
    assert chosen.model.model.config._attn_implementation == "eager"
