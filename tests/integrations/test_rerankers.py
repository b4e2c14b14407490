"""The pool in rerankers: the same calls and results as its own rankers."""

from __future__ import annotations

import asyncio
import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE
from fakes import score_of
from frameworks import need

need("rerankers")

from rerankers import Document, Reranker  # noqa: E402
from rerankers.models.ranker import BaseRanker  # noqa: E402
from rerankers.results import RankedResults  # noqa: E402

from mp_rerank import ModelSpec  # noqa: E402
from mp_rerank.integrations.rerankers import PoolRanker  # noqa: E402

pytestmark = pytest.mark.usefixtures("own_registry")


@pytest.fixture
def ranker() -> BaseRanker:
    return PoolRanker(FAKE, device="cpu", workers=2)


TEXTS = [f"document {i}" for i in range(20)]


def expected(query: str) -> list[tuple[int, str, float, int]]:
    scored = sorted(((score_of(query, text), i, text) for i, text in enumerate(TEXTS)), reverse=True)
    return [(i, text, score, rank) for rank, (score, i, text) in enumerate(scored, 1)]


def plain(results: RankedResults) -> list[tuple[Any, Any, Any, Any]]:
    return [(r.doc_id, r.text, r.score, r.rank) for r in results]


def test_many_threads_rank_with_one_ranker(ranker: BaseRanker) -> None:
    with ThreadPoolExecutor(16) as agents:
        queries = [f"query {i}" for i in range(64)]
        for query, results in zip(queries, agents.map(lambda q: ranker.rank(q, TEXTS), queries), strict=True):
            assert results.query == query
            assert results.has_scores
            assert plain(results) == expected(query)


def test_many_tasks_rank_with_one_ranker_on_the_pools_futures(
    ranker: BaseRanker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def agents() -> list[RankedResults]:
        return await asyncio.gather(*(ranker.rank_async(f"query {i}", TEXTS) for i in range(64)))

    monkeypatch.setattr(PoolRanker, "rank", None)  # what the base class would run in a thread
    for i, results in enumerate(asyncio.run(agents())):
        assert plain(results) == expected(f"query {i}")


def test_its_own_documents_keep_ids_and_metadata_and_are_not_changed(ranker: BaseRanker) -> None:
    documents = [Document(text, doc_id=f"id {i}", metadata={"source": i}) for i, text in enumerate(TEXTS)]
    before = copy.deepcopy([vars(document) for document in documents])
    results = ranker.rank("query", documents)
    assert [(r.doc_id, r.source) for r in results] == [(f"id {i}", i) for i, *_ in expected("query")]
    renamed = ranker.rank("query", documents, doc_ids=list(range(20)), metadata=[{"page": i} for i in range(20)])  # type: ignore[call-arg]
    assert [(r.doc_id, r.page) for r in renamed] == [(i, i) for i, *_ in expected("query")]
    assert [vars(document) for document in documents] == before
    anonymous = Document("text")
    assert ranker.rank("query", anonymous)[0].doc_id == 0
    assert anonymous.doc_id is None


def test_results_answer_as_its_own_do(ranker: BaseRanker) -> None:
    results = ranker.rank("query", TEXTS, doc_ids=[f"id {i}" for i in range(20)])
    first, *_ = expected("query")
    assert results.results_count() == 20
    assert results.top_k(1)[0].text == first[1]
    assert results.get_score_by_docid(f"id {first[0]}") == first[2] == ranker.score("query", first[1])
    assert results.get_result_by_docid(f"id {first[0]}").rank == 1
    assert plain(ranker.rank("query", "only")) == [(0, "only", score_of("query", "only"), 1)]
    assert ranker.rank("query", []).results == []


def test_ids_must_be_one_a_document(ranker: BaseRanker) -> None:
    with pytest.raises(ValueError, match="doc_ids: 20 are needed, one a document, not 3"):
        ranker.rank("query", TEXTS, doc_ids=[1, 2, 3])


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")  # transformers' own, from its loading in this process
def test_scores_are_those_of_its_own_transformer_ranker(tmp_path: Path) -> None:
    models = need("models")
    path = models.build("bert", tmp_path)
    own = Reranker(path, model_type="cross-encoder", device="cpu", verbose=0)
    ours = PoolRanker(path, device="cpu", workers=1)
    documents = models.TEXT
    wanted, got = own.rank(documents[0], documents), ours.rank(documents[0], documents)
    assert [r.doc_id for r in got] == [r.doc_id for r in wanted]
    assert [r.score for r in got] == pytest.approx([r.score for r in wanted], abs=1e-5)
    probabilities = models.load(path, "cpu").predict([(documents[0], document) for document in documents])
    assert sorted(r.score for r in wanted) != pytest.approx(sorted(probabilities), abs=1e-2), "they are logits"
    assert ours.score("a", "b") == pytest.approx(own.rank("a", ["b"])[0].score, abs=1e-5)


def test_a_copy_has_the_same_pool(ranker: BaseRanker) -> None:
    assert copy.deepcopy(ranker).pool is ranker.pool


def test_options_of_a_request_for_every_call_and_for_one() -> None:
    reading = ModelSpec("fake", loader="fakes:load_reading", max_length=8)
    ranker = PoolRanker(reading, device="cpu", workers=1, request_options={"instruction": "judge: "})
    texts = ["one", "two", "three"]
    scores = {text: score_of("judge: query", text) for text in texts}
    assert {r.text: r.score for r in ranker.rank("query", texts)} == scores
    assert ranker.score("query", "one") == scores["one"]
    best = max(scores.values())
    assert [r.score for r in ranker.rank("query", texts, min_score=best)] == [best]
    assert [r.score for r in asyncio.run(ranker.rank_async("query", texts, top_n=1))] == [best]
    plain = ranker.rank("query", texts, instruction=None)
    assert {r.text: r.score for r in plain} == {text: score_of("query", text) for text in texts}
    with pytest.raises(TypeError, match="instructions"):
        PoolRanker(reading, request_options={"instructions": "judge: "})  # type: ignore[typeddict-unknown-key]
