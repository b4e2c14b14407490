"""`PoolCrossEncoder`: a pool where sentence-transformers expects a ``CrossEncoder``, such as its evaluators.

    from mp_rerank.integrations.sentence_transformers import PoolCrossEncoder

    with RerankerPool("cross-encoder/ms-marco-MiniLM-L6-v2") as pool:
        metrics = CrossEncoderRerankingEvaluator(samples, name="dev")(PoolCrossEncoder(pool))

Scores are those of ``CrossEncoder.predict``: the logits after the model's activation (``ModelSpec.activation``, or the
model's own). It can score, and it cannot be trained. Works with sentence-transformers 5 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers import CrossEncoderModelCardData

from mp_rerank.client import RerankerClient
from mp_rerank.pool import RerankerPool

__all__ = ["PoolCrossEncoder"]


class PoolCrossEncoder:
    """``predict`` and ``rank`` of a ``CrossEncoder``, for any number of threads at once.

    Args:
        pool: the pool, or the client of a server, that scores. Its owner closes it.

    Attributes:
        model_card_data: where evaluators write their metrics.
    """

    def __init__(self, pool: RerankerPool | RerankerClient) -> None:
        self.pool = pool
        self.model_card_data = CrossEncoderModelCardData()

    def __repr__(self) -> str:
        return f"PoolCrossEncoder({self.pool!r})"

    @property
    def num_labels(self) -> int:
        """Scores per pair. Starts the pool if it has not started."""
        return self.pool.start().workers()[0].num_labels

    @property
    def max_length(self) -> int | None:
        """Tokens a pair is truncated to. Starts the pool if it has not started."""
        return self.pool.start().workers()[0].max_length

    def predict(self, inputs: Any = None, **options: Any) -> Any:
        """``CrossEncoder.predict``; see ``RerankerPool.predict``.

        All arguments but the first go by keyword, since their order differs between versions.
        """
        return self.pool.predict(inputs, **options)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """``CrossEncoder.rank``: dicts of ``corpus_id``, ``score`` and, if asked for, ``text``, best first."""
        return self.pool.rank(query, documents, top_k, return_documents, **options)
