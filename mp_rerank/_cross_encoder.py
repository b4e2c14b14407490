"""``CrossEncoder``'s own call shapes, so that a pool can stand in for one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np

from mp_rerank._arguments import Document, RequestKeywords, check_predict_options, items_of
from mp_rerank._checks import check_flag
from mp_rerank.results import RerankResult, Scores

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["CrossEncoderCalls"]


class CrossEncoderCalls(ABC):
    """``predict`` and ``rank`` in terms of a pool's own calls."""

    @abstractmethod
    def rerank(
        self,
        query: str,
        documents: Iterable[Document],
        *,
        top_n: SupportsIndex | None = None,
        **options: Unpack[RequestKeywords],
    ) -> list[RerankResult]:
        """Rank and wait."""

    @abstractmethod
    def _score_pairs(self, pairs: Iterable[Sequence[str]], **options: Unpack[RequestKeywords]) -> Scores:
        """Score pairs and wait."""

    def predict(
        self,
        inputs: Iterable[Sequence[str]] | Iterable[str] | None = None,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        sentences: Iterable[Sequence[str]] | Iterable[str] | None = None,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        apply_softmax: bool | None = False,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        **rest: Any,
    ) -> Any:
        """``CrossEncoder.predict``: scores of one pair or of a list of them, and wait.

        Args:
            inputs: pairs, or one pair; ``sentences`` is its name in sentence-transformers before 6.
            prompt_name, prompt: as ``prompt_name`` and ``instruction`` for ``submit``.
            batch_size: accepted; workers batch by tokens.
            show_progress_bar: accepted; nothing is shown.
            activation_fn: must be ``None``: it belongs to the model here (``ModelSpec.activation``).
            apply_softmax: with several labels, make each pair's scores sum to 1.
            convert_to_numpy, convert_to_tensor: what to return; tensors import torch into this process.
            rest: what other versions of sentence-transformers take. ``num_workers`` and ``chunk_size`` are accepted and
                make no difference. ``device``, ``pool`` and ``activation_fct`` must be ``None``, as ``activation_fn``
                must.

        Returns:
            A float32 array of shape (n,) or (n, num_labels), or without the first dimension for one pair; or a tensor,
            or a list of tensors, as ``CrossEncoder`` would.
        """
        del batch_size, show_progress_bar
        check_predict_options(activation_fn=activation_fn, **rest)
        check_flag("convert_to_numpy", convert_to_numpy)
        check_flag("convert_to_tensor", convert_to_tensor)
        check_flag("apply_softmax", False if apply_softmax is None else apply_softmax)
        given = items_of("inputs", inputs if inputs is not None else sentences, "pairs of (query, document) are needed")
        single = len(given) > 0 and isinstance(given[0], str)
        pairs = [given] if single else given
        scores = self._score_pairs(pairs, prompt_name=prompt_name, instruction=prompt)
        if apply_softmax and scores.ndim > 1:
            powers = np.exp(scores - scores.max(axis=1, keepdims=True))
            scores = powers / powers.sum(axis=1, keepdims=True)
        result: Any = scores
        if convert_to_tensor or not convert_to_numpy:
            import torch

            result = torch.from_numpy(scores.copy())
            if not convert_to_tensor:
                result = list(result)
        return result[0] if single else result

    def rank(
        self,
        query: str,
        documents: Iterable[Document],
        top_k: SupportsIndex | None = None,
        return_documents: bool = False,
        prompt_name: str | None = None,
        prompt: str | None = None,
        *,
        batch_size: int = 32,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[..., Any] | None = None,
        **rest: Any,
    ) -> list[dict[str, Any]]:
        """``CrossEncoder.rank``: dicts of ``corpus_id``, ``score`` and, if asked for, ``text``, best first.

        As with ``CrossEncoder``, ``text`` is the document as it was given: of one given as a dict, the dict.
        The other arguments are as for ``predict``.
        """
        del batch_size, show_progress_bar
        check_predict_options(activation_fn=activation_fn, **rest)
        check_flag("return_documents", return_documents)
        ranked = self.rerank(query, documents, top_n=top_k, prompt_name=prompt_name, instruction=prompt)
        results: list[dict[str, Any]] = [{"corpus_id": r.index, "score": r.relevance_score} for r in ranked]
        if return_documents:
            for result, r in zip(results, ranked, strict=True):
                result["text"] = r.document if r.record is None else r.record
        return results
