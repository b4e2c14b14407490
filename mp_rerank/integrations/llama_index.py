"""LlamaIndex: `PoolRerank`, a node postprocessor, sync and async.

    from mp_rerank.integrations.llama_index import PoolRerank

    engine = index.as_query_engine(similarity_top_k=50, node_postprocessors=[PoolRerank(top_n=5)])

Scores are those of LlamaIndex's ``SentenceTransformerRerank``: ``node.score`` is the score of ``CrossEncoder.predict``,
after the model's activation. The text that is scored is the node's text with its metadata for embedding. Unlike there,
the given nodes are left as they were: the returned ones are copies.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank.client import RerankerClient
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.integrations._remote import is_url, remote
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult
from mp_rerank.shared import shared_pool

__all__ = ["PoolRerank"]

dispatcher = get_dispatcher(__name__)


class PoolRerank(BaseNodePostprocessor):
    """The best ``top_n`` nodes, best first.

    Without ``pool``, it uses the process's shared pool for its model and device. It sends the events that LlamaIndex's
    own rerankers send: ``ReRankStartEvent`` and ``ReRankEndEvent``, and ``CBEventType.RERANKING``.

    Args:
        top_n: how many nodes to return.
        model: ``"builtin"``, a hub name, the path of a local folder, or the URL of a server (``mp-rerank serve``). A
            relative path is looked up once, here.
        device: as for ``shared_pool``.
        keep_retrieval_score: keep the score a node came with as its ``metadata["retrieval_score"]``.
        model_options: other fields of ``ModelSpec``.
        pool_options: other keywords of ``shared_pool``, or of ``connect``.
        similarity_cutoff: return only nodes that score at least so much: ``min_score`` of ``RerankerPool.submit``.
        request_options: other options of ``RerankerPool.submit``, such as ``instruction`` and ``long_documents``. Of a
            node that was divided, ``metadata["relevant_passage"]`` is the part that counted.
        pool: a pool, or a client of a server, to use in place of the shared one; it is not serialized by ``to_dict``.
    """

    model: str = Field(default=BUILTIN, description="Cross-encoder name or path.")
    top_n: int = Field(default=2, description="Number of nodes to return sorted by score.")
    device: str | None = Field(default=None, description="Device of the pool's workers.")
    keep_retrieval_score: bool = Field(default=False, description="Whether to keep the retrieval score in metadata.")
    model_options: dict[str, Any] = Field(default_factory=dict, description="Other fields of ModelSpec.")
    pool_options: dict[str, Any] = Field(default_factory=dict, description="Other options of the shared pool.")
    similarity_cutoff: float | None = Field(default=None, description="The least score of a node to return.")
    request_options: dict[str, Any] = Field(default_factory=dict, description="Options of each request.")
    _pool: RerankerPool | RerankerClient | None = PrivateAttr(default=None)
    _resolved: dict[str, str] = PrivateAttr(default_factory=dict)

    def __init__(self, top_n: int = 2, *, pool: RerankerPool | RerankerClient | None = None, **fields: Any) -> None:
        if pool is not None:
            fields.setdefault("model", pool.spec.name if isinstance(pool, RerankerPool) else pool.url)
        super().__init__(top_n=top_n, **fields)
        self._pool = pool
        self._resolved = {self.model: ModelSpec(self.model).name}
        RequestOptions.of(self._options())

    @classmethod
    def class_name(cls) -> str:
        """The name it is serialized under."""
        return "PoolRerank"

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        """The pool that scores."""
        if self._pool is not None:
            return self._pool
        if is_url(self.model):
            return remote(self.model, self.device, **self.pool_options)
        name = self._resolved.get(self.model, self.model)
        return shared_pool(ModelSpec(name, **self.model_options), self.device, **self.pool_options)

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        with self._event(nodes, query) as event:
            ranked = self._ranked(nodes, self.pool.rerank(query, _texts(nodes), top_n=self.top_n, **self._options()))
            _end(event, ranked)
        return ranked

    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _query(query_bundle)
        if not nodes:
            return []
        with self._event(nodes, query) as event:
            results = await self.pool.arerank(query, _texts(nodes), top_n=self.top_n, **self._options())
            ranked = self._ranked(nodes, results)
            _end(event, ranked)
        return ranked

    def _options(self) -> RequestKeywords:
        return {"min_score": self.similarity_cutoff, **self.request_options}  # type: ignore[typeddict-item]

    def _event(self, nodes: list[NodeWithScore], query: str) -> Any:
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=self.top_n, model_name=self.model))
        return self.callback_manager.event(
            CBEventType.RERANKING,
            payload={
                EventPayload.NODES: nodes,
                EventPayload.MODEL_NAME: self.model,
                EventPayload.QUERY_STR: query,
                EventPayload.TOP_K: self.top_n,
            },
        )

    def _ranked(self, nodes: list[NodeWithScore], results: list[RerankResult]) -> list[NodeWithScore]:
        ranked = []
        for result in results:
            found = nodes[result.index]
            inner = found.node
            more: dict[str, Any] = {"retrieval_score": found.score} if self.keep_retrieval_score else {}
            if result.passage is not None:
                more["relevant_passage"] = result.document[slice(*result.passage)]
            if more:
                inner = inner.model_copy(update={"metadata": {**inner.metadata, **more}})
            ranked.append(found.model_copy(update={"node": inner, "score": result.relevance_score}))
        return ranked


def _query(query_bundle: QueryBundle | None) -> str:
    if query_bundle is None:
        raise ValueError("query_bundle: reranking needs a query")
    query: str = query_bundle.query_str
    return query


def _texts(nodes: list[NodeWithScore]) -> list[str]:
    return [node.node.get_content(metadata_mode=MetadataMode.EMBED) for node in nodes]


def _end(event: Any, ranked: list[NodeWithScore]) -> None:
    dispatcher.event(ReRankEndEvent(nodes=ranked))
    event.on_end(payload={EventPayload.NODES: ranked})
