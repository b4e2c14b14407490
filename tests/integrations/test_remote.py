"""A server in place of a pool, or its URL in place of a model's name: every adapter takes one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from conftest import FAKE
from fakes import score_of
from frameworks import need
from serving import Running, serving

from mp_rerank import RerankerClient, connect
from mp_rerank.integrations import _remote

QUERY = "how do birds fly?"
TEXTS = ["Bread is baked.", "Wings give lift.", "Water is wet."]
SCORES = [score_of(QUERY, text) for text in TEXTS]
ORDER = sorted(range(3), key=lambda i: -SCORES[i])


@pytest.fixture
def server() -> Iterator[Running]:
    with serving({"fake": FAKE}, {"workers": 1}) as running:
        yield running


@pytest.fixture
def url(server: Running) -> Iterator[str]:
    yield server.url
    for activation in (None, "identity"):
        _remote.remote(server.url, None, activation).close()
    _remote._shared.cache_clear()


@pytest.fixture
def client(server: Running) -> Iterator[RerankerClient]:
    with connect(server.url) as pool:
        yield pool


def test_langchain(url: str, client: RerankerClient) -> None:
    need("langchain_core")
    from langchain_core.documents import Document

    from mp_rerank.integrations.langchain import PoolCrossEncoder, PoolReranker

    documents = [Document(page_content=text) for text in TEXTS]
    for reranker in (PoolReranker(model=url), PoolReranker(pool=client)):
        ranked = reranker.compress_documents(documents, QUERY)
        assert [document.page_content for document in ranked] == [TEXTS[i] for i in ORDER]
    for encoder in (PoolCrossEncoder(model_name=url), PoolCrossEncoder(client)):
        assert encoder.score([(QUERY, text) for text in TEXTS]) == SCORES
    with pytest.raises(ValueError, match="device: it is the server's"):
        PoolReranker(model=url, device="cpu").compress_documents(documents, QUERY)


def test_llama_index(url: str, client: RerankerClient) -> None:
    need("llama_index.core")
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from mp_rerank.integrations.llama_index import PoolRerank

    nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
    for postprocessor in (PoolRerank(top_n=2, model=url), PoolRerank(top_n=2, pool=client)):
        ranked = postprocessor.postprocess_nodes(nodes, QueryBundle(QUERY))
        assert [node.score for node in ranked] == [SCORES[i] for i in ORDER[:2]]


def test_haystack(url: str) -> None:
    need("haystack")
    from haystack import Document

    from mp_rerank.integrations.haystack import PoolRanker

    ranker = PoolRanker.from_dict(PoolRanker(model=url).to_dict())
    ranked = ranker.run(QUERY, [Document(content=text) for text in TEXTS])["documents"]
    assert [document.content for document in ranked] == [TEXTS[i] for i in ORDER]
    assert ranked[0].score == pytest.approx(1 / (1 + math.exp(-SCORES[ORDER[0]])), abs=1e-6)


def test_rerankers(url: str) -> None:
    need("rerankers")
    from mp_rerank.integrations.rerankers import PoolRanker

    ranked = PoolRanker(url).rank(QUERY, TEXTS)
    assert [(result.document.doc_id, result.score) for result in ranked] == [(i, SCORES[i]) for i in ORDER]


def test_langroid(url: str) -> None:
    tiktoken = need("tiktoken")
    for name in ("cl100k_base", "o200k_base"):
        tiktoken.registry.ENCODINGS[name] = tiktoken.Encoding(
            name, pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
        )
    need("langroid.agent.special.doc_chat_agent")
    from mp_rerank.integrations import langroid

    pool = langroid._pool(url, None, {})
    assert pool.predict([(QUERY, text) for text in TEXTS]).tolist() == SCORES


@pytest.mark.real  # its package imports torch
def test_sentence_transformers(client: RerankerClient) -> None:
    from mp_rerank.integrations.sentence_transformers import PoolCrossEncoder

    model = PoolCrossEncoder(client)
    assert (model.num_labels, model.max_length) == (1, None)
    assert [found["corpus_id"] for found in model.rank(QUERY, TEXTS)] == ORDER
