"""LangChain: `PoolCrossEncoder` for LangChain's ``CrossEncoderReranker``, and `PoolReranker`, an async compressor.

    from mp_rerank.integrations.langchain import PoolReranker

    retriever = ContextualCompressionRetriever(
        base_compressor=PoolReranker(pool=shared_pool("cross-encoder/ms-marco-MiniLM-L6-v2"), top_n=5),
        base_retriever=vectorstore.as_retriever(search_kwargs={"k": 50}),
    )
    documents = await retriever.ainvoke("how do birds fly?")

Scores are those of LangChain's ``HuggingFaceCrossEncoder``: the scores of ``CrossEncoder.predict``, after the model's
activation; of a model with two labels, the second label's. `PoolReranker` returns copies of the documents with the
score in ``metadata["relevance_score"]``, where LangChain's hosted rerankers put it.
"""

from __future__ import annotations

from collections.abc import Sequence

from langchain_core.callbacks import Callbacks
from langchain_core.cross_encoders import BaseCrossEncoder
from langchain_core.documents import BaseDocumentCompressor, Document
from pydantic import ConfigDict

from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult

__all__ = ["PoolCrossEncoder", "PoolReranker"]


class PoolCrossEncoder(BaseCrossEncoder):
    """The pool as LangChain's cross-encoder, for ``CrossEncoderReranker(model=...)`` and the like."""

    def __init__(self, pool: RerankerPool) -> None:
        self.pool = pool

    def score(self, text_pairs: list[tuple[str, str]]) -> list[float]:
        """The score of each pair; of two labels ("not relevant", "relevant") the second."""
        scores = self.pool.submit_pairs(text_pairs).result()
        relevant: list[float] = (scores if scores.ndim == 1 else scores[:, 1]).tolist()
        return relevant


class PoolReranker(BaseDocumentCompressor):
    """Returns the best documents, best first, as copies that keep id and metadata.

    Attributes:
        pool: the pool that scores.
        top_n: how many documents to return; ``None``: all.
        timeout: seconds after which a request fails with RequestTimeoutError; ``None``: never.
    """

    pool: RerankerPool
    top_n: int | None = 3
    timeout: float | None = None

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank ``documents`` and wait."""
        texts = [document.page_content for document in documents]
        return _ranked(documents, self.pool.rerank(query, texts, top_n=self.top_n, timeout=self.timeout))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> Sequence[Document]:
        """Rank ``documents`` while the loop goes on; no thread waits."""
        texts = [document.page_content for document in documents]
        return _ranked(documents, await self.pool.arerank(query, texts, top_n=self.top_n, timeout=self.timeout))


def _ranked(documents: Sequence[Document], results: Sequence[RerankResult]) -> list[Document]:
    return [
        documents[result.index].model_copy(
            update={"metadata": {**documents[result.index].metadata, "relevance_score": result.relevance_score}}
        )
        for result in results
    ]
