"""rerankers: `PoolRanker`, a ranker like those ``Reranker(...)`` returns.

    from mp_rerank.integrations.rerankers import PoolRanker

    ranker = PoolRanker("cross-encoder/ms-marco-MiniLM-L6-v2")
    ranker.rank("how do birds fly?", documents).top_k(5)

Scores are those of ``TransformerRanker``: the logits; higher is better. So the pool holds the model without its
activation. A given ``Document`` keeps its id and metadata and is not changed: ``doc_ids`` and ``metadata`` are put into
copies.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeAlias

from rerankers.documents import Document
from rerankers.models.ranker import BaseRanker
from rerankers.results import RankedResults, Result

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank.client import RerankerClient
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.integrations._remote import is_url, remote
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult
from mp_rerank.shared import shared_pool

__all__ = ["PoolRanker"]

Docs: TypeAlias = "str | Document | Sequence[str] | Sequence[Document]"


class PoolRanker(BaseRanker):
    """Ranks in the process's shared pool for its model and device.

    Args:
        model_name_or_path: ``"builtin"``, a hub name, the path of a local folder, the URL of a server
            (``mp-rerank serve``), or a ``ModelSpec``, whose ``activation`` is then applied.
        verbose: accepted; nothing is printed.
        device: as for ``shared_pool``.
        request_options: options of ``RerankerPool.submit`` for every call, such as ``instruction``; a call's own come
            before them.
        options: other keywords of ``shared_pool``, or of ``connect``.
    """

    ranking_type = "pointwise"

    def __init__(
        self,
        model_name_or_path: str | ModelSpec = BUILTIN,
        verbose: int = 0,
        device: str | None = None,
        request_options: RequestKeywords | None = None,
        **options: Any,
    ) -> None:
        RequestOptions.of(request_options or {})
        self._request_options: RequestKeywords = request_options or {}
        self.verbose = verbose
        self.device = device
        self._options = options
        self._model: Any = model_name_or_path
        self._spec = (
            model_name_or_path
            if isinstance(model_name_or_path, ModelSpec)
            else ModelSpec(model_name_or_path, activation="identity")
        )

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        """The pool that scores."""
        if is_url(self._model):
            return remote(self._model, self.device, "identity", **self._options)
        return shared_pool(self._spec, self.device, **self._options)

    def score(self, query: str, doc: str) -> float:
        """The logit of one document."""
        options = {name: value for name, value in self._request_options.items() if name != "min_score"}
        return float(self.pool.submit_pairs([(query, doc)], **options).result()[0])  # type: ignore[arg-type]

    def rank(
        self,
        query: str,
        docs: Docs,
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> RankedResults:
        """All documents, best first, with ranks from 1. Documents without an id are numbered from 0.

        Args:
            options: of ``RerankerPool.submit``, such as ``top_n``, ``instruction`` and ``min_score``.
        """
        documents = _documents(docs, doc_ids, metadata)
        texts = [document.text for document in documents]
        return _ranked(query, documents, self.pool.rerank(query, texts, **{**self._request_options, **options}))

    async def rank_async(
        self,
        query: str,
        docs: Docs,
        doc_ids: Sequence[str] | Sequence[int] | None = None,
        metadata: Sequence[dict[str, Any]] | None = None,
        **options: Any,
    ) -> RankedResults:
        """``rank`` while the loop goes on; no thread waits."""
        documents = _documents(docs, doc_ids, metadata)
        texts = [document.text for document in documents]
        return _ranked(query, documents, await self.pool.arerank(query, texts, **{**self._request_options, **options}))


def _documents(docs: Docs, doc_ids: Sequence[Any] | None, metadata: Sequence[dict[str, Any]] | None) -> list[Document]:
    given = [docs] if isinstance(docs, (str, Document)) else list(docs)
    for name, values in (("doc_ids", doc_ids), ("metadata", metadata)):
        if values is not None and len(values) != len(given):
            raise ValueError(f"{name}: {len(given)} are needed, one a document, not {len(values)}")
    documents = []
    for place, doc in enumerate(given):
        document = copy.copy(doc) if isinstance(doc, Document) else Document(doc)
        if doc_ids is not None:
            document.doc_id = doc_ids[place]
        elif document.doc_id is None:
            document.doc_id = place
        if metadata is not None:
            document.metadata = metadata[place]
        documents.append(document)
    return documents


def _ranked(query: str, documents: list[Document], results: list[RerankResult]) -> RankedResults:
    return RankedResults(
        results=[
            Result(document=documents[result.index], score=result.relevance_score, rank=rank)
            for rank, result in enumerate(results, 1)
        ],
        query=query,
        has_scores=True,
    )
