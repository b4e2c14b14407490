"""What a request may say of how its pairs are read, and what its results tell: the same from every call."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked
from fakes import score_of

from mp_rerank import ModelSpec, RerankerPool, ScoringError, TextTooLongError

MakePool = Callable[..., RerankerPool]

# Eight words a pair, two of them the query's: six are left for a document.
READING = ModelSpec("fake", loader="fakes:load_reading", max_length=8)
NAN = ModelSpec("fake", loader="fakes:load_with_nan")
QUERY = "two words"
SHORT = "three little words"
LONG = "a b c d e f g h i j k l"


@pytest.fixture
def pool(make_pool: MakePool) -> RerankerPool:
    return make_pool(READING)


def test_an_instruction_goes_before_the_query_in_every_call(pool: RerankerPool) -> None:
    expected = score_of("judge: " + QUERY, SHORT)
    options: dict[str, Any] = {"instruction": "judge: "}
    assert pool.rerank(QUERY, [SHORT], **options)[0].relevance_score == expected
    assert pool.submit_pairs([(QUERY, SHORT)], **options).result(PATIENCE).tolist() == [expected]
    assert list(pool.stream(QUERY, [SHORT], **options)) == [(0, expected)]
    assert asyncio.run(pool.arerank(QUERY, [SHORT], **options))[0].relevance_score == expected
    assert pool.predict([(QUERY, SHORT)], prompt="judge: ").tolist() == [expected]
    assert pool.rank(QUERY, [SHORT], prompt="judge: ")[0]["score"] == expected
    assert pool.rerank(QUERY, [SHORT])[0].relevance_score == score_of(QUERY, SHORT)


def test_a_prompt_of_the_model_goes_by_its_name(pool: RerankerPool) -> None:
    expected = score_of("be short: " + QUERY, SHORT)
    assert pool.rerank(QUERY, [SHORT], prompt_name="short")[0].relevance_score == expected
    assert pool.predict([(QUERY, SHORT)], prompt_name="short").tolist() == [expected]
    assert pool.workers()[0].prompts == ("short",)
    with pytest.raises(ValueError, match="prompt_name: the model has no prompt 'long'; it has short"):
        pool.rerank(QUERY, [SHORT], prompt_name="long")


@pytest.mark.parametrize("cache", [0, 10])
def test_pairs_are_equal_only_if_they_are_read_alike(make_pool: MakePool, fifo: Fifo, cache: int) -> None:
    with make_pool(READING, workers=1, score_cache=cache) as pool:
        held = pool.submit(QUERY, [fifo.order])  # what follows waits, together
        fifo.wait_until_read()
        options = [{}, {"instruction": "judge: "}, {"truncation": "start"}, {"instruction": "judge: "}, {}]
        futures = [pool.submit(QUERY, [LONG], **how) for how in options]  # type: ignore[arg-type]
        fifo.release()
        scores = [future.result(PATIENCE)[0].relevance_score for future in futures]
        assert scores == [
            score_of(QUERY, "a b c d e f"),
            score_of("judge: " + QUERY, "a b c d e"),
            score_of(QUERY, "g h i j k l"),
            *[score_of("judge: " + QUERY, "a b c d e"), score_of(QUERY, "a b c d e f")],
        ]
        assert held.result(PATIENCE)
        assert pool.stats().coalesced_pairs == 2
        assert pool.rerank(QUERY, [LONG], truncation="start")[0].relevance_score == scores[2]
        assert pool.stats().cached_pairs == (1 if cache else 0)


def test_results_tell_what_was_read_and_stats_count_it(pool: RerankerPool) -> None:
    results = {r.index: r for r in pool.rerank(QUERY, [SHORT, LONG])}
    assert [(results[i].tokens, results[i].truncated) for i in range(2)] == [(5, False), (8, True)]
    stats = pool.stats()
    assert (stats.scored_tokens, stats.truncated_pairs, stats.scored_pairs) == (13, 1, 2)


def test_a_kept_score_keeps_its_reading(make_pool: MakePool) -> None:
    pool = make_pool(READING, score_cache=10)
    for _ in range(2):
        (result,) = pool.rerank(QUERY, [LONG])
        assert (result.tokens, result.truncated) == (8, True)
    assert pool.stats().cached_pairs == 1


def test_a_model_that_counts_nothing_says_nothing(make_pool: MakePool) -> None:
    pool = make_pool()
    (result,) = pool.rerank(QUERY, [SHORT])
    assert (result.tokens, result.truncated, result.passage) == (None, None, None)
    assert (pool.stats().scored_pairs, pool.stats().scored_tokens) == (1, 0)  # no estimate


def test_the_best_chunk_counts_and_the_result_says_where_it_is(pool: RerankerPool) -> None:
    (result,) = pool.rerank(QUERY, [LONG], long_documents="chunk")
    parts = ["a b c d e f", "g h i j k l"]
    best = max(parts, key=lambda part: score_of(QUERY, part))
    assert result.relevance_score == score_of(QUERY, best)
    assert result.passage is not None
    assert LONG[slice(*result.passage)] == best
    assert (result.tokens, result.truncated) == (16, False)


def test_a_document_that_is_too_long_fails_its_request_and_no_other(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(READING, workers=1) as pool:
        held = pool.submit(QUERY, [fifo.order])
        fifo.wait_until_read()
        strict = pool.submit(QUERY, [SHORT, LONG], truncation="error")
        fitting = pool.submit(QUERY, [SHORT, "fits"], truncation="error")
        other = pool.submit(QUERY, [SHORT, LONG])
        fifo.release()
        error = strict.exception(PATIENCE)
        assert isinstance(error, TextTooLongError)
        assert isinstance(error, ValueError)
        assert (error.document_index, error.tokens, error.limit) == (1, 12, 6)
        assert str(error) == "document 1 is too long: 12 tokens, where 6 are allowed (truncation='error')"
        assert len(fitting.result(PATIENCE)) == len(other.result(PATIENCE)) == 2
        assert held.result(PATIENCE)
        assert pool.stats().failed == 1
        assert pool.stats().crashes == 0


def test_a_score_that_is_no_number_fails_its_request_by_name(make_pool: MakePool) -> None:
    pool = make_pool(NAN, score_cache=10)
    for _ in range(2):  # such a score is not kept either
        error = pool.submit("query", ["a", "!nan", "b"]).exception(PATIENCE)
        assert isinstance(error, ScoringError)
        assert error.document_index == 1
    assert "document 1 could not be scored on cpu: its score is nan" in str(error)
    assert pool.rerank("query", ["a", "b"]) == ranked("query", ["a", "b"])
    pairs = pool.submit_pairs([("query", "!nan")]).exception(PATIENCE)
    assert isinstance(pairs, ScoringError)


def test_a_score_that_is_no_number_can_rank_last_as_none(make_pool: MakePool) -> None:
    pool = make_pool(NAN, nan_scores="none", score_cache=5)
    results = pool.rerank("query", ["!nan", "a", "b"])
    assert [(r.index, r.relevance_score) for r in results[:2]] == [
        (r.index + 1, r.relevance_score) for r in ranked("query", ["a", "b"])
    ]
    assert (results[2].index, results[2].relevance_score) == (0, None)
    assert np.isnan(pool.submit_pairs([("query", "!nan"), ("query", "a")]).result(PATIENCE)).tolist() == [True, False]
    with pytest.raises(ValueError, match="nan_scores: 'error' or 'none' is needed, not 'last'"):
        RerankerPool(FAKE, nan_scores="last")


def test_a_bound_on_scores_leaves_out_what_is_below_it_and_what_has_none(make_pool: MakePool, fifo: Fifo) -> None:
    documents = [f"document {i}" for i in range(20)]
    pool = make_pool(ModelSpec("fake", loader="fakes:load_obeying"), workers=1, slice_tokens=10)
    best = [r for r in ranked("query", documents) if r.relevance_score is not None and r.relevance_score >= 0.5]
    assert 0 < len(best) < 20
    assert pool.rerank("query", documents, min_score=0.5) == best
    assert pool.rerank("query", documents, min_score=0.5, top_n=2) == best[:2]
    assert pool.rerank("query", documents, min_score=best[0].relevance_score) == best[:1]  # the bound is within
    assert pool.rerank("query", documents, min_score=math.inf) == []
    future = pool.submit("query", [fifo.order], timeout=1.0, on_timeout="partial", min_score=0.0)
    fifo.wait_until_read()
    assert future.result(PATIENCE) == []
    fifo.release()
    for call in (
        lambda: pool.submit_pairs([("query", "document")], min_score=0.5),
        lambda: pool.stream("query", ["document"], min_score=0.5),
    ):
        with pytest.raises(ValueError, match="min_score: it is for rankings"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"instruction": 5}, TypeError, "instruction: a string is needed, not int 5"),
        ({"instruction": "a", "prompt_name": "b"}, ValueError, "a request has one of the two"),
        ({"max_tokens_per_doc": 0}, ValueError, "max_tokens_per_doc: at least 1"),
        ({"max_tokens_per_doc": 1.5}, TypeError, "max_tokens_per_doc: a whole number or None"),
        ({"truncation": "middle"}, ValueError, "truncation: 'end' or 'start' or 'error' is needed, not 'middle'"),
        ({"long_documents": True}, ValueError, "long_documents: 'truncate' or 'chunk' is needed, not True"),
        ({"min_score": "0.5"}, TypeError, "min_score: a number or None is needed, not str '0.5'"),
        ({"min_score": math.nan}, ValueError, "min_score: a number is needed, not nan"),
        ({"instructions": "a"}, TypeError, "a request has no option instructions; it has"),
    ],
)
def test_a_mistake_is_named_where_the_caller_is(
    pool: RerankerPool, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        pool.submit(QUERY, [SHORT], **options)
    assert pool.workers() == []  # nothing was started for it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instruction": "judge: "}, "cannot follow instruction: it needs a CrossEncoder whose predict takes a prompt"),
        ({"max_tokens_per_doc": 5}, "cannot follow max_tokens_per_doc: it needs a CrossEncoder whose tokenizer"),
        ({"truncation": "start"}, "cannot follow truncation"),
        ({"long_documents": "chunk"}, "cannot follow long_documents"),
    ],
)
def test_a_model_that_cannot_follow_an_option_is_an_error_where_the_caller_is(
    make_pool: MakePool, options: dict[str, Any], message: str
) -> None:
    pool = make_pool()
    with pytest.raises(ValueError, match=message):
        pool.rerank(QUERY, [SHORT], **options)
    with pytest.raises(ValueError, match=message):
        pool.submit_pairs([(QUERY, SHORT)], **options)
    assert pool.rerank(QUERY, [SHORT])


def test_what_only_the_old_model_can_do_is_done_by_the_old_model(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(READING, workers=1) as pool:
        held = pool.submit(QUERY, [fifo.order])
        fifo.wait_until_read()
        ahead = pool.submit(QUERY, ["sent to the worker already"])
        for _ in range(2):  # the second is answered after what the first found was sent
            pool.stats()
        waiting = pool.submit(QUERY, [SHORT], instruction="judge: ")
        pool.reload(FAKE)
        with pytest.raises(ValueError, match="cannot follow instruction"):
            pool.submit(QUERY, [SHORT], instruction="judge: ")
        fifo.release()
        assert waiting.result(PATIENCE)[0].relevance_score == score_of("judge: " + QUERY, SHORT)
        assert held.result(PATIENCE)
        assert ahead.result(PATIENCE)


def test_many_documents_cut_off_are_said_once(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    pool = make_pool(READING)
    pool.rerank(QUERY, [f"{i} {LONG}" for i in range(99)])
    assert "cut off" not in caplog.text
    for _ in range(3):
        pool.rerank(QUERY, [f"{i} {LONG} {_}" for i in range(100)])
    pool.close()
    (said,) = [r for r in caplog.records if "cut off" in r.getMessage()]
    assert said.levelname == "WARNING"
    assert "do not fit fake with their queries, and were cut off: long_documents='chunk'" in said.getMessage()


def test_chunks_of_a_document_count_as_one_document_at_a_deadline(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(READING, workers=1, slice_tokens=1) as pool:
        held = pool.submit(QUERY, [fifo.order])
        fifo.wait_until_read()
        error = pool.submit(QUERY, [LONG, SHORT], long_documents="chunk", timeout=0.05).exception(PATIENCE)
        assert "0 of 2 documents were scored" in str(error)
        fifo.release()
        assert held.result(PATIENCE)
