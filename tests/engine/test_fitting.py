"""Documents that are too long: cut at either end, refused, or divided; and what is told of each pair."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mp_rerank import ModelSpec
from mp_rerank._pairs import PLAIN

torch = pytest.importorskip("torch")
models = pytest.importorskip("models")
from mp_rerank._engine.engine import Engine  # noqa: E402
from mp_rerank._engine.fitting import chunks, place_before  # noqa: E402

pytestmark = pytest.mark.real

SENTENCES = [f"Sentence {i} tells of birds that fly and of {word}." for i, word in enumerate(models.TEXT * 8)]
LONG = " ".join(SENTENCES)
QUERY = "how do birds fly"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(ModelSpec(max_length=64), "cpu", 1, 512).optimize()


def count(engine: Engine, *texts: str) -> int:
    return len(engine.model.tokenizer(*([t] for t in texts), truncation=False, verbose=False)["input_ids"][0])


def alone(engine: Engine, text: str) -> int:
    return count(engine, text) - 2


def predict(engine: Engine, document: str, **options: Any) -> float:
    return float(engine.predict([(QUERY, document)], [PLAIN._replace(**options)])[0])


def plain(engine: Engine, document: str) -> float:
    return float(engine.model.predict([(QUERY, document)], show_progress_bar=False)[0])


def test_tokens_are_those_of_the_tokenizer_and_what_was_cut_off_is_known(engine: Engine) -> None:
    documents = ["short", LONG, "", " ".join(["fly"] * (64 - count(engine, QUERY, "")))]
    engine.predict([(QUERY, document) for document in documents])
    assert engine.readings is not None
    assert list(engine.readings.tokens) == [min(64, count(engine, QUERY, document)) for document in documents]
    assert list(engine.readings.truncated) == [0, 1, 0, 0]  # the last fits to the token


def test_a_limit_a_document_cuts_the_text_at_a_token(engine: Engine) -> None:
    for limit in (1, 7, 20):
        score = predict(engine, LONG, max_tokens_per_doc=limit)
        assert engine.readings is not None
        assert engine.readings.of(0)[:2] == (count(engine, QUERY, "") + limit, True)
        places = engine.model.tokenizer(LONG, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        part = LONG[: places["offset_mapping"][limit - 1][1]]
        assert score == pytest.approx(plain(engine, part), abs=1e-6)
    assert predict(engine, "short", max_tokens_per_doc=7) == pytest.approx(plain(engine, "short"), abs=1e-6)
    assert engine.readings.of(0).truncated is False


def test_the_start_can_be_cut_off_in_place_of_the_end(engine: Engine) -> None:
    score = predict(engine, LONG, truncation="start")
    assert engine.readings is not None
    assert engine.readings.of(0)[:2] == (64, True)
    room = 64 - count(engine, QUERY, "")
    kept = next(LONG[i:] for i in range(len(LONG) - 10 * room, len(LONG)) if alone(engine, LONG[i:]) <= room)
    assert len(kept) < 9 * room  # so none of those before the first that was tried fits
    assert score == pytest.approx(plain(engine, kept.strip()), abs=1e-6)
    assert predict(engine, LONG, truncation="end") == pytest.approx(plain(engine, LONG), abs=1e-6)


def test_too_long_can_be_an_error_with_both_numbers(engine: Engine) -> None:
    pairs = [(QUERY, "short"), (QUERY, LONG), (QUERY, "short too")]
    scores = engine.predict(pairs, [PLAIN._replace(truncation="error")] * 3)
    assert np.isnan(scores).tolist() == [False, True, False]
    assert engine.readings is not None
    assert engine.readings.too_long == {1: (count(engine, QUERY, LONG), 64)}
    predict(engine, LONG, truncation="error", max_tokens_per_doc=5)
    assert engine.readings.too_long == {0: (alone(engine, LONG), 5)}


def test_the_best_chunk_counts_and_is_told(engine: Engine) -> None:
    answer = "Birds fly by flapping their wings."
    for before, after in (([], SENTENCES), (SENTENCES[:40], SENTENCES[40:]), (SENTENCES, [])):
        document = " ".join([*before, answer, *after])
        score = predict(engine, document, long_documents="chunk")
        assert engine.readings is not None
        tokens, truncated, passage = engine.readings.of(0)
        assert passage is not None
        assert score == pytest.approx(plain(engine, document[slice(*passage)]), abs=1e-6)
        assert not truncated
        assert tokens > count(engine, QUERY, document)
        assert count(engine, QUERY, document[slice(*passage)]) <= 64
    assert predict(engine, "short", long_documents="chunk") == pytest.approx(plain(engine, "short"), abs=1e-6)
    assert engine.readings.of(0).passage is None


def test_pairs_with_other_options_share_a_slice_and_keep_their_order(engine: Engine) -> None:
    prompt = "Judge: " if "prompt" in engine.facts()["takes"] else None
    how = [
        PLAIN,
        PLAIN._replace(prompt=prompt),
        PLAIN._replace(long_documents="chunk"),
        PLAIN._replace(truncation="start"),
        PLAIN._replace(prompt=prompt, max_tokens_per_doc=9),
    ]
    together = engine.predict([(QUERY, LONG)] * 5, how)
    readings = engine.readings
    assert readings is not None
    for i, options in enumerate(how):
        assert together[i] == pytest.approx(predict(engine, LONG, **options._asdict()), abs=1e-6)
        assert engine.readings is not None
        assert engine.readings.of(0) == readings.of(i)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_prompt_is_that_of_predict(family: str, tmp_path: Path) -> None:
    folder = models.build(family, tmp_path)
    fast = Engine(ModelSpec(folder), "cpu", 1, 256).optimize()
    if "prompt" not in fast.facts()["takes"]:
        pytest.skip("predict takes no prompt in this version of sentence-transformers")
    pairs = [(query, document) for query in models.TEXT[:2] for document in models.TEXT]
    expected = fast.model.predict(pairs, prompt="Judge: ", show_progress_bar=False)
    assert fast._pipeline is not None
    assert fast._pipeline.takes_prompt
    found = fast.predict(pairs, [PLAIN._replace(prompt="Judge: ")] * len(pairs))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not np.allclose(found, fast.predict(pairs), rtol=1e-5, atol=1e-5)


def test_20000_words_with_as_many_take_no_gigabytes_and_give_the_score_of_predict(engine: Engine) -> None:
    words = random.Random(0).choices([word.strip(".") for word in LONG.split()], k=39_000)
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    for query, document in ((words[:19_000], words[19_000:]), (words[19_000:], words[:19_000])):
        score = engine.predict([(" ".join(query), " ".join(document))])[0]
        assert engine.readings is not None
        assert engine.readings.of(0)[:2] == (64, True)
        # The same tokens as those of texts that ``predict`` can be given, the longer of which is the longer still.
        parts = [" ".join(part[: len(part) // 100]) for part in (query, document)]
        assert score == pytest.approx(float(engine.model.predict([parts], show_progress_bar=False)[0]), abs=1e-6)
    assert process.memory_info().rss - before < 200 * 2**20


def test_a_passage_is_found_in_a_text_with_halves_of_characters(engine: Engine) -> None:
    document = "\ud83d\ude00 \ud83d " * 3 + LONG
    predict(engine, document, long_documents="chunk")
    assert engine.readings is not None
    passage = engine.readings.of(0).passage
    assert passage is not None
    assert document[slice(*passage)].strip() in document
    assert place_before("\ud83d\ude00a\ud83db", "\U0001f600a\ufffdb", (1, 4)) == (2, 5)


@given(st.lists(st.sampled_from(["a", "bb", "ccc", "end.", "so?", "line\n"]), max_size=80), st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_chunks_cover_the_text_in_order_and_none_is_longer_than_it_may_be(words: list[str], room: int) -> None:
    text = " ".join(words)
    places, at = [], 0
    for word in words:
        places.append((at, at + len(word.strip())))
        at += len(word) + 1
    found = chunks(text, places, room)
    assert found[0][0] == 0
    assert found[-1][1] == len(text)
    for begin, end in found:
        assert sum(begin <= start and stop <= end for start, stop in places) <= room
    for (first, end), (begin, _) in pairwise(found):
        assert first < begin
        assert not text[end:begin].strip(), "nothing lies between two"
    covered = {i for i, (start, stop) in enumerate(places) if any(a <= start and stop <= b for a, b in found)}
    assert covered == set(range(len(places)))


def test_chunks_begin_and_end_where_sentences_do(engine: Engine) -> None:
    text = " ".join(f"This is sentence number {i} of a long text." for i in range(60))
    places = engine.model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    found = chunks(text, places["offset_mapping"], 50)
    assert len(found) > 10
    assert all(text[begin:end].rstrip().endswith(".") for begin, end in found)
    assert all(text[begin:].startswith("This") for begin, _ in found)
    assert all(begin < end for (_, end), (begin, _) in pairwise(found)), "each shares a sentence"


def test_the_model_s_own_prompts_go_by_their_names(tmp_path: Path) -> None:
    model = models.load(models.build("bert", tmp_path), "cpu")
    if not hasattr(model, "prompts"):
        pytest.skip("no model has prompts in this version of sentence-transformers")
    model.prompts = {"web": "Judge web pages: "}
    loaded = Engine(ModelSpec("fake"), "cpu", 1, 256, model, owns_process=True).optimize()
    assert loaded.facts()["prompts"] == {"web": "Judge web pages: "}
    expected = model.predict([(QUERY, "text")], prompt_name="web", show_progress_bar=False)
    found = loaded.predict([(QUERY, "text")], [PLAIN._replace(prompt="Judge web pages: ")])
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.skipif(not models.has_logit_score(), reason="this sentence-transformers knows no chat templates")
def test_what_a_chat_template_and_a_default_prompt_take_is_left_to_them(tmp_path: Path) -> None:
    folder = models.build(models.LOGIT_SCORE, tmp_path)
    loaded = Engine(ModelSpec(folder), "cpu", 1, 512).optimize()
    words = " ".join(SENTENCES[:20])
    loaded.predict([(QUERY, words)] * 2, [PLAIN._replace(long_documents="chunk"), PLAIN._replace(truncation="start")])
    assert loaded.readings is not None
    chunked, cut = loaded.readings.of(0), loaded.readings.of(1)
    assert chunked.passage is not None
    assert not chunked.truncated, "each chunk fits beside the query, the template and the prompt"
    assert cut.truncated
    assert loaded.max_length is not None
    assert loaded.max_length - 3 <= cut.tokens <= loaded.max_length
