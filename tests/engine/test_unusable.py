"""A model that cannot work says why in one line; one that feels its padding is scored without any."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
import transformers  # noqa: E402

from mp_rerank._engine.engine import Engine  # noqa: E402

pytestmark = pytest.mark.real

PAIRS = [(query, document) for query in models.TEXT[:3] for document in (*models.TEXT, "", "long " * 300)]


def engine(folder: Path, **options: Any) -> Engine:
    return Engine(ModelSpec(str(folder), prepack=False, **options), "cpu", None, 256)


def save(family: str, folder: Path, *, tokenizer: bool = True, **changes: Any) -> None:
    """A model of ``family``, with its padding token changed or its tokenizer's files left out."""
    texts = models._tokenizer(family)
    model = models._model(family, texts, 1)
    if "pad_token" in changes:
        texts.pad_token = changes["pad_token"]
        model.config.pad_token_id = None
    if "pad_token_id" in changes:
        model.config.pad_token_id = changes["pad_token_id"]
    model.save_pretrained(folder)
    if tokenizer:
        texts.save_pretrained(folder)


def test_no_padding_token_and_what_gives_one(tmp_path: Path) -> None:
    save("qwen2", tmp_path, pad_token=None)
    with pytest.raises(ValueError, match="has no padding token") as caught:
        engine(tmp_path)
    advice = str(caught.value).partition("such as ")[2].replace("..., ", "")
    settings = eval(advice, {"ModelSpec": lambda **settings: settings})
    assert settings == {"tokenizer_kwargs": {"pad_token": "[SEP]"}, "config_kwargs": {"pad_token_id": 2}}
    assert engine(tmp_path, **settings).optimize().predict(PAIRS).shape == (len(PAIRS),)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_more_tokens_than_positions(family: str, tmp_path: Path) -> None:
    save(family, tmp_path)
    with pytest.raises(ValueError, match=r"up to 500 tokens .* has positions for 128: .*max_length=128"):
        engine(tmp_path, max_length=500)
    assert engine(tmp_path, max_length=128).predict(PAIRS).shape == (len(PAIRS),)


@pytest.mark.skipif(transformers.__version__ < "5", reason="older versions refuse it themselves")
def test_a_tokenizer_without_its_files(tmp_path: Path) -> None:
    save("bert", tmp_path, tokenizer=False)
    with pytest.raises(ValueError, match="makes the same tokens of every text"):
        engine(tmp_path)


def test_a_head_drawn_at_random(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="drawn at random"):
        engine(Path(models.build_headless(tmp_path)))


def test_a_part_that_nothing_reads_may_be_missing(tmp_path: Path) -> None:
    """It is drawn at random too, and makes no difference."""
    save("distilbert", tmp_path)
    model = models.load(str(tmp_path), "cpu").model
    weights = model.state_dict()
    weights["classifier.weight"] = torch.zeros_like(weights["classifier.weight"])  # of what is missing
    del weights["pre_classifier.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    assert np.isfinite(engine(tmp_path).predict(PAIRS)).all()


@pytest.mark.parametrize("kind", ["another pad token", "XLNet"])
def test_a_model_that_feels_its_padding(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pair's score is the one that it has alone, whatever else is asked for at the same time."""
    if kind == "XLNet":
        if transformers.__version__ < "5":
            pytest.skip("sentence-transformers takes its unlimited length for a negative number there")
        texts = models._tokenizer("deberta-v2")
        torch.manual_seed(0)
        size = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64, "initializer_range": 0.2, "num_labels": 1}
        config = transformers.XLNetConfig(vocab_size=len(texts), pad_token_id=texts.pad_token_id, **size)
        transformers.XLNetForSequenceClassification(config).save_pretrained(tmp_path)
        texts.save_pretrained(tmp_path)
    else:
        save("qwen2", tmp_path, pad_token_id=3)
    plain = models.load(str(tmp_path), "cpu")
    pairs = PAIRS[:8]
    alone = np.array([plain.predict([pair])[0] for pair in pairs])
    assert np.abs(plain.predict(pairs) - alone).max() > 1e-2
    with caplog.at_level(logging.WARNING, "mp_rerank"):
        careful = engine(tmp_path).optimize()
    assert careful.recipe.equal_lengths
    [warning] = [record.getMessage() for record in caplog.records if record.name.startswith("mp_rerank")]
    assert "padding changes this model's scores" in warning
    assert ("its tokenizer's 1" in warning) == (kind != "XLNet")
    np.testing.assert_allclose(careful.predict(pairs), alone, rtol=1e-5, atol=1e-5)
    careful._pipeline = None  # with predict, which alone knows how long pairs are: one by one
    np.testing.assert_allclose(careful.predict(pairs), alone, rtol=1e-5, atol=1e-5)
    assert engine(tmp_path).optimize(careful.recipe).recipe.equal_lengths


def test_what_is_off_is_said_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save("deberta-v2", tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "pos_att_type": ["c2p"]}))  # half of its kind
    with caplog.at_level(logging.INFO, "mp_rerank"):
        engine(tmp_path).optimize()
    [said] = [record.getMessage() for record in caplog.records if record.name == "mp_rerank._engine.engine"]
    assert said.startswith("faster by: pipeline. Left out: unpadded: its attention does not go through transformers' ")
