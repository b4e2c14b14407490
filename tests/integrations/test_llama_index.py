"""The pool in LlamaIndex: its own query engine, events and serialization."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import score_of
from frameworks import need

from mp_rerank import ModelSpec, RerankerPool

need("llama_index.core")

from llama_index.core import Settings  # noqa: E402
from llama_index.core.base.base_retriever import BaseRetriever  # noqa: E402
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler  # noqa: E402
from llama_index.core.instrumentation import get_dispatcher  # noqa: E402
from llama_index.core.instrumentation.event_handlers import BaseEventHandler  # noqa: E402
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent  # noqa: E402
from llama_index.core.llms import MockLLM  # noqa: E402
from llama_index.core.query_engine import RetrieverQueryEngine  # noqa: E402
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode  # noqa: E402

from mp_rerank.integrations.llama_index import PoolRerank  # noqa: E402

MakePool = Callable[..., RerankerPool]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:llama_index")


def nodes_of(query: str) -> list[NodeWithScore]:
    return [
        NodeWithScore(
            node=TextNode(id_=f"id {i}", text=f"{query}, node {i}", metadata={"source": f"file {i}"}),
            score=1.0 / (i + 1),
        )
        for i in range(20)
    ]


class Retriever(BaseRetriever):
    """A first stage that finds the same number of nodes for every query."""

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return nodes_of(query_bundle.query_str)


class Events(BaseEventHandler):
    """Keeps the rerank events."""

    seen: list[Any] = []  # noqa: RUF012

    def handle(self, event: Any, **_: Any) -> None:
        if isinstance(event, (ReRankStartEvent, ReRankEndEvent)):
            self.seen.append(event)


@pytest.fixture(autouse=True)
def _mock_llm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())


@pytest.fixture
def events() -> Iterator[Events]:
    handler = Events(seen=[])
    dispatcher = get_dispatcher()
    dispatcher.add_event_handler(handler)
    yield handler
    dispatcher.event_handlers.remove(handler)


def expected(query: str, top_n: int) -> list[tuple[str, float]]:
    scored = [(n.node_id, score_of(query, n.node.get_content(MetadataMode.EMBED))) for n in nodes_of(query)]
    return sorted(scored, key=lambda pair: -pair[1])[:top_n]


def plain(nodes: list[NodeWithScore]) -> list[tuple[str, float | None]]:
    return [(n.node_id, n.score) for n in nodes]


def engine(rerank: PoolRerank) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(Retriever(), node_postprocessors=[rerank])


def test_many_threads_ask_one_query_engine(make_pool: MakePool) -> None:
    with make_pool() as pool, ThreadPoolExecutor(16) as agents:
        ask = engine(PoolRerank(top_n=3, pool=pool)).query
        queries = [f"query {i}" for i in range(64)]
        for query, response in zip(queries, agents.map(ask, queries), strict=True):
            assert plain(response.source_nodes) == expected(query, 3)


def test_many_tasks_ask_one_query_engine_on_the_pools_futures(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def agents(asked: RetrieverQueryEngine) -> list[Any]:
        return await asyncio.gather(*(asked.aquery(f"query {i}") for i in range(64)))

    with make_pool() as pool:
        monkeypatch.setattr(PoolRerank, "_postprocess_nodes", None)  # what the base class would run in a thread
        for i, response in enumerate(asyncio.run(agents(engine(PoolRerank(top_n=3, pool=pool))))):
            assert plain(response.source_nodes) == expected(f"query {i}", 3)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_its_events_tell_of_each_rerank(make_pool: MakePool, events: Events, asynchronous: bool) -> None:
    debug = LlamaDebugHandler(print_trace_on_end=False)
    with make_pool() as pool:
        rerank = PoolRerank(top_n=2, pool=pool, callback_manager=CallbackManager([debug]))
        if asynchronous:
            ranked = asyncio.run(rerank.apostprocess_nodes(nodes_of("query"), query_str="query"))
        else:
            ranked = rerank.postprocess_nodes(nodes_of("query"), query_str="query")
    start, end = events.seen
    assert (start.query, start.top_n, start.model_name, len(start.nodes)) == ("query", 2, "fake", 20)
    assert plain(end.nodes) == plain(ranked) == expected("query", 2)
    [(before, after)] = debug.get_event_pairs(CBEventType.RERANKING)
    assert before.payload is not None
    assert before.payload["query_str"] == "query"
    assert after.payload is not None
    assert plain(after.payload["nodes"]) == plain(ranked)


def test_nodes_given_are_left_as_they_were(make_pool: MakePool) -> None:
    given = nodes_of("query")
    with make_pool() as pool:
        ranked = PoolRerank(top_n=20, pool=pool, keep_retrieval_score=True).postprocess_nodes(given, query_str="query")
        plainly = PoolRerank(top_n=20, pool=pool).postprocess_nodes(given, query_str="query")
    assert given == nodes_of("query")
    by_id = {node.node_id: node for node in given}
    for node in ranked:
        found = by_id[node.node_id]
        assert node.node.metadata == {**found.node.metadata, "retrieval_score": found.score}
        assert node.node.hash != found.node.hash
    assert all(node.node is by_id[node.node_id].node for node in plainly)


def test_without_nodes_or_without_a_query(make_pool: MakePool) -> None:
    rerank = PoolRerank(pool=make_pool())
    assert rerank.postprocess_nodes([], query_str="query") == []
    with pytest.raises(ValueError, match="reranking needs a query"):
        rerank.postprocess_nodes(nodes_of("query"))


@pytest.mark.usefixtures("own_registry")
def test_it_is_rebuilt_from_its_description_and_shares_the_pool() -> None:
    rerank = PoolRerank(
        top_n=4, model="fake", device="cpu", model_options={"loader": "fakes:load"}, pool_options={"workers": 1}
    )
    again = PoolRerank.from_dict(rerank.to_dict())
    assert again.to_dict() == rerank.to_dict()
    assert again.pool is rerank.pool
    assert plain(again.postprocess_nodes(nodes_of("query"), query_str="query")) == expected("query", 4)
    assert copy.deepcopy(rerank).pool is rerank.pool


@pytest.mark.usefixtures("own_registry")
def test_a_relative_path_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    rerank = PoolRerank(model="tiny", device="cpu")
    monkeypatch.chdir("/")
    assert rerank.pool.spec.name == str(tmp_path / "tiny")
    assert rerank.model == "tiny", "what to_dict keeps is what was given"


def test_a_copy_has_the_same_pool(make_pool: MakePool) -> None:
    rerank = PoolRerank(pool=make_pool(isolation="thread"))
    assert copy.deepcopy(rerank).pool is rerank.pool


def test_options_of_a_request(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("fake", loader="fakes:load_reading", max_length=8))
    node = NodeWithScore(node=TextNode(text="a b c d e f g h i j"), score=0.1)
    options = {"instruction": "judge: ", "long_documents": "chunk"}
    rerank = PoolRerank(pool=pool, request_options=options)
    best = max(["a b c d e f", "g h i j"], key=lambda part: score_of("judge: query", part))
    for ranked in (
        rerank.postprocess_nodes([node], query_str="query"),
        asyncio.run(rerank.apostprocess_nodes([node], query_str="query")),
    ):
        assert [found.score for found in ranked] == [score_of("judge: query", best)]
        assert ranked[0].node.metadata == {"relevant_passage": best}
    assert node.node.metadata == {}
    assert PoolRerank(pool=pool, similarity_cutoff=1.0).postprocess_nodes([node], query_str="query") == []
    again = PoolRerank.from_dict(rerank.to_dict())
    assert again.request_options == options
    with pytest.raises(TypeError, match="instructions"):
        PoolRerank(pool=pool, request_options={"instructions": "judge: "})
