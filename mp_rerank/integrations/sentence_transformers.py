"""`PoolCrossEncoder`: a pool where sentence-transformers expects a ``CrossEncoder``, such as its evaluators.

    from mp_rerank.integrations.sentence_transformers import PoolCrossEncoder

    with RerankerPool("cross-encoder/ms-marco-MiniLM-L6-v2") as pool:
        metrics = CrossEncoderRerankingEvaluator(samples, name="dev")(PoolCrossEncoder(pool))

Scores are ``CrossEncoder.predict``'s own: the logits after the model's activation (``ModelSpec.activation``, or what
the model brings). It has what scoring needs and nothing of training. Works with sentence-transformers 5 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sentence_transformers import CrossEncoderModelCardData

from mp_rerank.pool import RerankerPool

__all__ = ["PoolCrossEncoder"]

# What this class answers for in the pool's name, or what makes no difference to its scores.
_IMMATERIAL = {"batch_size", "show_progress_bar", "chunk_size", "convert_to_numpy", "convert_to_tensor"}


class PoolCrossEncoder:
    """``predict`` and ``rank`` of a ``CrossEncoder``, for any number of threads at once.

    Args:
        pool: the pool that scores; closing it stays with whoever made it.

    Attributes:
        model_card_data: where evaluators leave their metrics.
    """

    def __init__(self, pool: RerankerPool) -> None:
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

    def predict(
        self,
        inputs: Sequence[Sequence[str]] | Sequence[str] | None = None,
        *,
        sentences: Sequence[Sequence[str]] | Sequence[str] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **options: Any,
    ) -> Any:
        """``CrossEncoder.predict``; beyond the first argument everything goes by keyword, as orders differ by version.

        ``batch_size``, ``show_progress_bar`` and ``chunk_size`` are accepted and make no difference. What would change
        the scores and a pool cannot do per call (``prompt``, ``prompt_name``, ``activation_fn``, ``device``, ``pool``)
        must be ``None``; else it is a ``ValueError``.
        """
        _check(options)
        return self.pool.predict(
            inputs,
            sentences=sentences,
            apply_softmax=apply_softmax,
            convert_to_numpy=convert_to_numpy,
            convert_to_tensor=convert_to_tensor,
        )

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        top_k: int | None = None,
        return_documents: bool = False,
        **options: Any,
    ) -> list[dict[str, Any]]:
        """``CrossEncoder.rank``: dicts of ``corpus_id``, ``score`` and, if asked for, ``text``, best first.

        Scores are floats. ``options`` are as for ``predict``.
        """
        _check({name: value for name, value in options.items() if name != "apply_softmax"})  # of one label: nothing
        return self.pool.rank(query, documents, top_k, return_documents)


def _check(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value is not None and name not in _IMMATERIAL:
            raise ValueError(
                f"{name}: a pool has this from its model and not from call to call; it must be None, not {value!r}"
            )
