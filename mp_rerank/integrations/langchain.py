"""LangChain: `PoolCrossEncoder` for LangChain's ``CrossEncoderReranker``, and `PoolReranker`, an async compressor.

    from mp_rerank.integrations.langchain import PoolReranker

    retriever = ContextualCompressionRetriever(
        base_compressor=PoolReranker(model="cross-encoder/ms-marco-MiniLM-L6-v2", top_n=5),
        base_retriever=vectorstore.as_retriever(search_kwargs={"k": 50}),
    )
    documents = await retriever.ainvoke("how do birds fly?")

Both take a model, and use the process's shared pool for it, or a pool.

Scores are those of LangChain's ``HuggingFaceCrossEncoder``: the scores of ``CrossEncoder.predict``, after the model's
activation; of a model with two labels, the second label's. `PoolReranker` returns copies of the documents with the
score in ``metadata["relevance_score"]``, where LangChain's hosted rerankers put it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict, PrivateAttr

from mp_rerank._arguments import OnTimeout, RequestKeywords, RequestOptions
from mp_rerank._pairs import LongDocuments, Truncation
from mp_rerank.client import RerankerClient
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.integrations._remote import is_url, remote
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult
from mp_rerank.shared import shared_pool

__all__ = ["PoolCrossEncoder", "PoolReranker"]

Model = str | os.PathLike[str] | ModelSpec


class _Source:
    """Where a pool comes from: it was given, or it is the shared one of a model."""

    def __init__(
        self,
        pool: RerankerPool | RerankerClient | None,
        model: Model | None,
        device: str | None,
        options: dict[str, Any],
    ):
        if pool is not None and not isinstance(pool, (RerankerPool, RerankerClient)):
            raise TypeError(f"pool: a RerankerPool is needed, not {pool!r}; a model's name goes by model=")
        if pool is not None and not (model is None and device is None and not options):
            raise ValueError("pool: it has its model, device and options; give the one or the others")
        self._pool = pool
        named = BUILTIN if model is None else model
        # A relative path is looked up once, here.
        self._spec = named if isinstance(named, ModelSpec) else ModelSpec(named)  # type: ignore[arg-type]
        self._device = device
        self._options = options

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        if self._pool is not None:
            return self._pool
        if is_url(self._spec.name):
            return remote(self._spec.name, self._device, **self._options)
        return shared_pool(self._spec, self._device, **self._options)


class PoolCrossEncoder(BaseCrossEncoder):
    """The pool as LangChain's cross-encoder, for ``CrossEncoderReranker(model=...)`` and the like.

    Args:
        pool: the pool, or the client of a server, that scores; ``None``: the process's shared one.
        request_options: those of ``RerankerPool.submit_pairs``, such as ``instruction``.
        model_name: of the shared one, as LangChain's ``HuggingFaceCrossEncoder`` calls it: ``"builtin"``, a hub name,
            the path of a local folder, the URL of a server (``mp-rerank serve``), or a ``ModelSpec``.
        device: as for ``shared_pool``.
        options: other keywords of ``shared_pool``, or of ``connect``.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        pool: RerankerPool | RerankerClient | None = None,
        *,
        model_name: Model | None = None,
        device: str | None = None,
        request_options: RequestKeywords | None = None,
        **options: Any,
    ) -> None:
        self._source = _Source(pool, model_name, device, options)
        self._request_options: RequestKeywords = request_options or {}
        RequestOptions.of(self._request_options)

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        """The pool that scores."""
        return self._source.pool

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """The score of each pair; of two labels ("not relevant", "relevant") the second."""
        scores = self.pool.submit_pairs(text_pairs, **self._request_options).result()
        relevant: list[float] = (scores if scores.ndim == 1 else scores[:, 1]).tolist()
        return relevant


class PoolReranker(BaseDocumentCompressor):
    """Returns the best documents, best first, as copies that keep id and metadata.

    Args:
        pool: the pool, or the client of a server, that scores; ``None``: the process's shared one.
        model: of the shared one: ``"builtin"`` (the default), a hub name, the path of a local folder, the URL of a
            server (``mp-rerank serve``), or a ``ModelSpec``.
        device: as for ``shared_pool``.
        pool_options: other keywords of ``shared_pool``.
        top_n: how many documents to return; ``None``: all.
        timeout: seconds after which a request fails with RequestTimeoutError; ``None``: never.
        score_threshold: return only documents that score at least so much: ``min_score`` of ``RerankerPool.submit``.
        instruction, prompt_name, max_tokens_per_doc, truncation, long_documents, caller, priority, on_timeout: as for
            ``RerankerPool.submit``. Of a document that was divided, ``metadata["relevant_passage"]`` is the part that
            counted.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    top_n: int | None = 3
    timeout: float | None = None
    score_threshold: float | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    max_tokens_per_doc: int | None = None
    truncation: Truncation = "end"
    long_documents: LongDocuments = "truncate"
    caller: str | None = None
    priority: int = 0
    on_timeout: OnTimeout = "raise"
    _source: _Source = PrivateAttr()

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def __init__(
        self,
        *,
        pool: RerankerPool | RerankerClient | None = None,
        model: Model | None = None,
        device: str | None = None,
        pool_options: dict[str, Any] | None = None,
        **fields: Any,
    ) -> None:
        source = _Source(pool, model, device, pool_options or {})
        super().__init__(**fields)
        self._source = source
        RequestOptions.of(self._options())

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        """The pool that scores."""
        return self._source.pool

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank ``documents`` and wait."""
        texts = [document.page_content for document in documents]
        return _ranked(documents, self.pool.rerank(query, texts, top_n=self.top_n, **self._options()))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank ``documents`` while the loop goes on; no thread waits."""
        texts = [document.page_content for document in documents]
        return _ranked(documents, await self.pool.arerank(query, texts, top_n=self.top_n, **self._options()))

    def _options(self) -> RequestKeywords:
        return {
            "timeout": self.timeout,
            "min_score": self.score_threshold,
            "instruction": self.instruction,
            "prompt_name": self.prompt_name,
            "max_tokens_per_doc": self.max_tokens_per_doc,
            "truncation": self.truncation,
            "long_documents": self.long_documents,
            "caller": self.caller,
            "priority": self.priority,
            "on_timeout": self.on_timeout,
        }


def _ranked(documents: Sequence[Document], results: Sequence[RerankResult]) -> list[Document]:
    ranked = []
    for result in results:
        document = documents[result.index]
        found: dict[str, Any] = {"relevance_score": result.relevance_score}
        if result.passage is not None:
            found["relevant_passage"] = document.page_content[slice(*result.passage)]
        ranked.append(document.model_copy(update={"metadata": {**document.metadata, **found}}))
    return ranked
