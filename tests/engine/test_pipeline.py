"""A pipeline scores as ``CrossEncoder.predict`` does, or ``predict`` is called."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mp_rerank import ModelSpec

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine import engine as module  # noqa: E402
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.pipeline import without_surrogates  # noqa: E402

pytestmark = pytest.mark.real

PAIRS = [(query, document) for query in models.TEXT[:3] for document in (*models.TEXT, "", " ", "long " * 300)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(models.build("bert", tmp_path_factory.mktemp("bert")))


def engine(folder: str, loaded: Any = None, **options: Any) -> Engine:
    return Engine(
        ModelSpec(folder, prepack=False, **options), "cpu", None, 256, loaded, owns_process=loaded is not None
    ).optimize()


def count_calls(model: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []
    original = getattr(type(model), name)

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return original(self, *arguments, **options)

    monkeypatch.setattr(type(model), name, counted)
    return calls


@pytest.mark.parametrize("family", models.FAMILIES)
def test_predict_is_not_called(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build(family, tmp_path)
    fast, plain = engine(folder, max_length=100), models.load(folder, "cpu", max_length=100)
    expected = plain.predict(PAIRS)
    calls = count_calls(plain, "predict", monkeypatch)
    np.testing.assert_allclose(fast.predict(PAIRS), expected, rtol=1e-5, atol=1e-5)
    assert not calls


def test_texts_are_tokenized_once_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = engine(models.build("bert", tmp_path))
    calls = count_calls(fast._pipeline, "tokenize", monkeypatch)
    fast.predict(PAIRS)
    assert len(calls) == 1
    lengths = [len(row) for row in fast.model.tokenizer(*zip(*PAIRS, strict=True), truncation=True)["input_ids"]]
    assert max(lengths) == models.MAX_LENGTH
    assert sum(fast.readings.tokens) == sum(lengths)


def ahead(folder: str, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """An engine that tokenizes ahead, as for a GPU, four pairs at a time."""
    fast = engine(folder)
    monkeypatch.setattr(module, "PART_PAIRS", 4)
    monkeypatch.setattr(fast, "_on_cpu", False)
    return fast


def test_parts_that_are_tokenized_ahead_score_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models.build("bert", tmp_path)
    whole, parts = engine(folder), ahead(folder, monkeypatch)
    np.testing.assert_allclose(parts.predict(PAIRS), whole.predict(PAIRS), rtol=1e-5, atol=1e-5)
    assert parts.readings == whole.readings
    assert sum(parts.readings.truncated)


def test_no_part_is_tokenized_after_another_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is one thread's at a time: of two, one is told that it is borrowed already."""
    fast = ahead(models.build("bert", tmp_path), monkeypatch)
    tokenize, began, failed = fast._pipeline.tokenize, threading.Event(), threading.Event()
    ended: list[str] = []

    def slow(pairs: Any, prompt: Any = None) -> Any:
        second = began.is_set()
        began.set()
        assert not second or failed.wait(60)
        tokenized = tokenize(pairs, prompt)
        ended.append("second" if second else "first")
        return tokenized

    def fail(*arguments: Any) -> None:
        failed.set()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(fast._pipeline, "tokenize", slow)
    monkeypatch.setattr(fast._pipeline, "launch", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        fast.predict(PAIRS)
    assert ended == ["first", "second"]


@pytest.mark.skipif(not models.has_logit_score(), reason="this sentence-transformers knows no chat templates")
def test_prompts_and_chat_templates_are_left_to_the_library(tmp_path: Path) -> None:
    """It makes the tokens of a slice at once; they are then cut into batches by their lengths."""
    folder = models.build(models.LOGIT_SCORE, tmp_path)
    fast, plain = engine(folder), models.load(folder, "cpu")
    assert fast.recipe.pipeline == "preprocess"
    texts = fast.model.tokenizer.batch_decode(fast._pipeline.tokenize(PAIRS[:2]).inputs["input_ids"])
    assert all("Is this the answer?" in text and "<assistant>" in text for text in texts)
    np.testing.assert_allclose(fast.predict(PAIRS), plain.predict(PAIRS), rtol=1e-5, atol=1e-5)
    assert list(fast.readings.tokens) == fast._pipeline.tokenize(PAIRS).lengths
    for (_, document), tokens, cut in zip(PAIRS, fast.readings.tokens, fast.readings.truncated, strict=True):
        assert tokens == models.MAX_LENGTH if cut else len(document) < 1000
    assert fast._pipeline.takes_prompt
    other = fast._predict(PAIRS[:3], "Another question. ")
    np.testing.assert_allclose(fast._score(PAIRS[:3], "Another question. ")[0], other, rtol=1e-5, atol=1e-5)
    assert not np.allclose(other, plain.predict(PAIRS[:3]), atol=1e-4)


@pytest.mark.parametrize("changed", ["tokens", "scores"])
def test_a_predict_that_does_anything_else_is_called(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another version of the library might: with spaces at the ends of a text, for example."""
    folder = models.build("roberta", tmp_path)
    plain = models.load(folder, "cpu")
    original = type(plain).predict

    def predict(self: Any, pairs: Any, **options: Any) -> Any:
        if changed == "tokens":
            return original(self, [(query.strip(), document.strip()) for query, document in pairs], **options)
        return original(self, pairs, **options) * 2

    pairs = [(f" {query}  ", document) for query, document in PAIRS]
    before = plain.predict(pairs)
    monkeypatch.setattr(type(plain), "predict", predict)
    expected = plain.predict(pairs)
    assert not np.allclose(before, expected, atol=1e-3)
    np.testing.assert_allclose(engine(folder).predict(pairs), expected, rtol=1e-5, atol=1e-5)


def test_a_loader_s_own_predict_is_called(tmp_path: Path) -> None:
    """Even one that scores the texts of the proof as the library does."""
    folder = models.build("bert", tmp_path)
    loaded = models.load(folder, "cpu")
    predict = loaded.predict
    loaded.predict = lambda pairs, **options: predict(
        [(query, document.replace(" cat ", " dog ")) for query, document in pairs], **options
    )
    animals = ("cat", "dog", "cow", "bee", "hen", "fox")
    cat, dog, *others = engine(folder, loaded).predict(
        [("Who sleeps?", f"The {animal} is asleep.") for animal in animals]
    )
    assert cat == pytest.approx(dog, abs=1e-6)
    assert max(abs(other - dog) for other in others) > 1e-4  # of one alone it may be less, by chance


def test_hooks_are_run(tmp_path: Path) -> None:
    folder = models.build("bert", tmp_path)
    hooked = models.load(folder, "cpu")
    seen: list[object] = []
    hooked.register_forward_hook(lambda module, arguments, output: seen.append(output))
    slow = engine(folder, hooked)
    seen.clear()
    slow.predict(PAIRS[:3])
    assert seen or not hasattr(type(hooked), "preprocess")  # older versions' predict passes by the module's forward


@pytest.mark.parametrize("way", ["pipeline", "predict"])
def test_a_lone_surrogate_is_read_as_u_fffd(way: str, bert: str) -> None:
    read_as = {
        "\ud83d": "\ufffd",
        "half \ude42 an emoji": "half \ufffd an emoji",
        "\ud83d\ude42 whole": "🙂 whole",
        "\ude42\ud83d": "\ufffd\ufffd",
        "\ud83d\ud83d\ude42": "\ufffd🙂",
        "\ufeff🙂 \ud83dend": "\ufeff🙂 \ufffdend",
    }
    assert {text: without_surrogates(text) for text in read_as} == read_as
    surrogates = engine(bert, models.load(bert, "cpu"))
    if way == "predict":
        surrogates._pipeline = None
    plain = models.load(bert, "cpu").predict([pair for read in read_as.values() for pair in both_ways(read)])
    scores = surrogates.predict([pair for text in read_as for pair in both_ways(text)])
    np.testing.assert_allclose(scores, plain, rtol=1e-5, atol=1e-5)


def both_ways(text: str) -> list[tuple[str, str]]:
    return [("query", text), (text, "document")]


def test_text_without_surrogates_is_left_as_it_is() -> None:
    for text in ("", "ascii", "Köln", "東京 🙂", "\ufffd", "\0"):
        assert without_surrogates(text) is text
