"""The pool in LangChain: its own retriever, compressor and cross-encoder seam."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import FAKE, PATIENCE, Fifo
from fakes import score_of
from frameworks import need

from mp_rerank import ModelPools, ModelSpec, RequestTimeoutError, RerankerPool, shared_pool

need("langchain_core")
need("langchain_classic.retrievers.document_compressors")

from langchain_classic.retrievers import ContextualCompressionRetriever  # noqa: E402
from langchain_classic.retrievers.document_compressors import CrossEncoderReranker  # noqa: E402
from langchain_core.documents import Document  # noqa: E402
from langchain_core.retrievers import BaseRetriever  # noqa: E402

from mp_rerank.integrations.langchain import PoolCrossEncoder, PoolReranker  # noqa: E402

MakePool = Callable[..., RerankerPool]


def documents_of(query: str) -> list[Document]:
    return [
        Document(id=f"id {i}", page_content=f"{query}, document {i}", metadata={"source": f"file {i}", "nested": {}})
        for i in range(20)
    ]


class Retriever(BaseRetriever):
    """A first stage that finds the same number of documents for every query."""

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        return documents_of(query)


def expected(query: str, top_n: int | None) -> list[tuple[str | None, str, dict[str, Any]]]:
    scored = [(score_of(query, d.page_content), d) for d in documents_of(query)]
    scored.sort(key=lambda pair: -pair[0])
    return [(d.id, d.page_content, {**d.metadata, "relevance_score": score}) for score, d in scored[:top_n]]


def plain(documents: list[Document]) -> list[tuple[str | None, str, dict[str, Any]]]:
    return [(d.id, d.page_content, d.metadata) for d in documents]


def test_many_threads_retrieve_through_one_pool(make_pool: MakePool) -> None:
    with make_pool() as pool, ThreadPoolExecutor(16) as agents:
        retriever = ContextualCompressionRetriever(
            base_compressor=PoolReranker(pool=pool, top_n=5), base_retriever=Retriever()
        )
        queries = [f"query {i}" for i in range(64)]
        for query, found in zip(queries, agents.map(retriever.invoke, queries), strict=True):
            assert plain(found) == expected(query, 5)


def test_many_tasks_retrieve_through_one_pool_on_its_futures(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def agents(retriever: ContextualCompressionRetriever) -> list[list[Document]]:
        return await asyncio.gather(*(retriever.ainvoke(f"query {i}") for i in range(64)))

    with make_pool() as pool:
        monkeypatch.setattr(PoolReranker, "compress_documents", None)  # what the base class would run in a thread
        compressor = PoolReranker(pool=pool, top_n=None)
        retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=Retriever())
        for i, found in enumerate(asyncio.run(agents(retriever))):
            assert plain(found) == expected(f"query {i}", None)


def test_documents_given_are_left_as_they_were(make_pool: MakePool) -> None:
    class Tagged(Document):
        tag: str = "mine"

    with make_pool() as pool:
        documents = [Tagged(page_content="text", metadata={"source": "here"})]
        [ranked] = PoolReranker(pool=pool).compress_documents(documents, "query")
    assert documents == [Tagged(page_content="text", metadata={"source": "here"})]
    assert isinstance(ranked, Tagged)
    assert ranked.tag == "mine"
    assert ranked.metadata == {"source": "here", "relevance_score": score_of("query", "text")}


def test_no_documents_are_ranked_to_none(make_pool: MakePool) -> None:
    with make_pool() as pool:
        assert PoolReranker(pool=pool).compress_documents([], "query") == []
        assert asyncio.run(PoolReranker(pool=pool).acompress_documents([], "query")) == []


def test_a_timeout_is_kept(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        blocking = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        with pytest.raises(RequestTimeoutError):
            PoolReranker(pool=pool, timeout=0.01).compress_documents(documents_of("query"), "query")
        fifo.release()
        blocking.result(PATIENCE)


def test_langchains_own_reranker_takes_the_pool_as_its_cross_encoder(make_pool: MakePool) -> None:
    with make_pool() as pool:
        found = CrossEncoderReranker(model=PoolCrossEncoder(pool), top_n=4).compress_documents(
            documents_of("query"), "query"
        )
        assert [d.id for d in found] == [id_ for id_, _, _ in expected("query", 4)]
        scores = PoolCrossEncoder(pool).score([("q", "a"), ("r", "b")])
        assert scores == [score_of("q", "a"), score_of("r", "b")]
        assert all(type(score) is float for score in scores)


def test_of_several_labels_the_second_is_relevance(make_pool: MakePool) -> None:
    with make_pool(ModelSpec("three", loader="fakes:load_three_labels")) as pool:
        assert PoolCrossEncoder(pool).score([("q", "a")]) == [score_of("a", "q")]


def test_a_copy_has_the_same_pool(make_pool: MakePool) -> None:
    pool = make_pool(isolation="thread")
    for holder in (PoolReranker(pool=pool), PoolCrossEncoder(pool)):
        assert copy.deepcopy(holder).pool is pool
    assert PoolReranker(pool=pool).model_copy(deep=True).pool is pool


@pytest.mark.usefixtures("own_registry")
def test_a_model_s_name_stands_for_its_shared_pool() -> None:
    options: dict[str, Any] = {"workers": 1}
    reranker = PoolReranker(model=FAKE, device="cpu", pool_options=options, top_n=4)
    assert reranker.pool is shared_pool(FAKE, "cpu")
    assert plain(reranker.compress_documents(documents_of("query"), "query")) == expected("query", 4)
    encoder = PoolCrossEncoder(model_name=FAKE, device="cpu", workers=1)
    assert encoder.pool is reranker.pool
    for again in (copy.deepcopy(reranker), reranker.model_copy(deep=True), copy.deepcopy(encoder)):
        assert again.pool is reranker.pool
    reranker.pool.close()
    assert plain(reranker.compress_documents(documents_of("query"), "query")) == expected("query", 4)
    assert PoolReranker().pool.spec == ModelSpec()


@pytest.mark.usefixtures("own_registry")
def test_two_activations_work_side_by_side() -> None:
    rerankers = [
        PoolReranker(model=spec, device="cpu", pool_options={"workers": 1}, top_n=3)
        for spec in (FAKE, dataclasses.replace(FAKE, activation="identity"))
    ]
    for reranker in rerankers:
        assert plain(reranker.compress_documents(documents_of("query"), "query")) == expected("query", 3)
    assert rerankers[0].pool is not rerankers[1].pool


def test_models_of_several_adapters_stay_within_one_bound() -> None:
    with ModelPools("8GiB", devices="cpu", isolation="thread") as pools:
        for spec in (FAKE, dataclasses.replace(FAKE, name="other")):
            reranker = PoolReranker(model=spec, pool_options={"pools": pools}, top_n=3)
            assert plain(reranker.compress_documents(documents_of("query"), "query")) == expected("query", 3)
            found = PoolReranker(pool=pools.pool(spec), top_n=3).compress_documents(documents_of("query"), "query")
            assert plain(found) == expected("query", 3)
        assert {kept.model for kept in pools.stats().models} == {"fake", "other"}


def test_what_cannot_be_a_pool_is_named(make_pool: MakePool) -> None:
    for make in (PoolReranker, PoolCrossEncoder):
        with pytest.raises(TypeError, match="pool: a RerankerPool is needed, not 'builtin'; a model's name goes by"):
            make(pool="builtin")
    pool = make_pool()
    with pytest.raises(ValueError, match="pool: it has its model, device and options"):
        PoolReranker(pool=pool, model="builtin")
    with pytest.raises(ValueError, match="pool: it has its model, device and options"):
        PoolCrossEncoder(pool, device="cpu")
    with pytest.raises(ValueError, match="top_k"):
        PoolReranker(pool=pool, top_k=3)


def test_options_of_a_request_are_fields_of_the_compressor(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("fake", loader="fakes:load_reading", max_length=8))
    long = Document(page_content="a b c d e f g h i j", metadata={"page": 1})
    reranker = PoolReranker(pool=pool, instruction="judge: ", long_documents="chunk", caller="chain")
    (found,) = reranker.compress_documents([long], "query")
    parts = ["a b c d e f", "g h i j"]
    best = max(parts, key=lambda part: score_of("judge: query", part))
    assert found.metadata == {
        "page": 1,
        "relevance_score": score_of("judge: query", best),
        "relevant_passage": best,
    }
    assert "chain" in pool.stats().callers
    picky = PoolReranker(pool=pool, score_threshold=1.0)
    assert picky.compress_documents([long], "query") == []
    assert asyncio.run(picky.acompress_documents([long], "query")) == []
    with pytest.raises(ValueError, match="truncation"):
        PoolReranker(pool=pool, truncation="middle")
    crossing = PoolCrossEncoder(pool, request_options={"instruction": "judge: "})
    assert crossing.score([("query", "short")]) == [score_of("judge: query", "short")]
    with pytest.raises(TypeError, match="instructions"):
        PoolCrossEncoder(pool, request_options={"instructions": "judge: "})  # type: ignore[typeddict-unknown-key]
