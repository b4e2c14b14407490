"""Haystack: `PoolRanker`, a component for pipelines, sync and async.

    components:
      ranker:
        type: mp_rerank.integrations.haystack.PoolRanker
        init_parameters:
          model: cross-encoder/ms-marco-MiniLM-L6-v2
          top_k: 5

    Pipeline.loads(text, allowed_modules=["mp_rerank.integrations.haystack"])

Haystack 3 loads only the modules that it is told to trust. This module is not among them by default, since
``model_options`` can name code to run (``loader``, ``trust_remote_code``): allow it for YAML that you trust.

Scores are those of Haystack's ``SentenceTransformersSimilarityRanker``: with ``scale_score`` (the default) the sigmoid
of the model's logit, in [0, 1], and without it the logit. So the pool holds the model without its activation. Documents
come back as copies with ``score`` set; of several documents with the same id, one.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import numpy as np
from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils import ComponentDevice

from mp_rerank._arguments import RequestOptions
from mp_rerank._checks import check_flag, check_optional_count
from mp_rerank.client import RerankerClient
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.integrations._remote import is_url, remote
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult
from mp_rerank.shared import shared_pool

__all__ = ["PoolRanker"]


@component
class PoolRanker:
    """Ranks documents by their relevance to a query, in the process's shared pool for its model and device.

    Args:
        model: ``"builtin"``, a hub name, the path of a local folder, or the URL of a server (``mp-rerank serve``). A
            relative path is looked up once, here.
        device: as for ``shared_pool``; or a ``ComponentDevice``, also as the dict that YAML has of one. A device map
            splits one model over devices, which no pool does.
        top_k: how many documents to return; ``None``: all.
        query_prefix, document_prefix: put before the query and before each document's text.
        meta_fields_to_embed: names of the metadata to put before the text, joined by ``embedding_separator``.
        scale_score: ``True``: scores are sigmoids; ``False``: logits.
        score_threshold: return only documents that score at least so much.
        model_options: other fields of ``ModelSpec``, but for ``activation``.
        pool_options: other keywords of ``shared_pool``, or of ``connect``.
        request_options: options of ``RerankerPool.submit``, such as ``instruction``, ``max_tokens_per_doc`` and
            ``long_documents``; ``top_k`` and ``score_threshold`` stand for ``top_n`` and ``min_score``. Of a
            document that was divided, ``meta["relevant_passage"]`` is the part that counted.

    Raises:
        TypeError, ValueError: naming the argument and its value.
    """

    def __init__(
        self,
        model: str = BUILTIN,
        device: str | ComponentDevice | dict[str, Any] | None = None,
        top_k: int | None = 10,
        query_prefix: str = "",
        document_prefix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        scale_score: bool = True,
        score_threshold: float | None = None,
        model_options: dict[str, Any] | None = None,
        pool_options: dict[str, Any] | None = None,
        request_options: dict[str, Any] | None = None,
    ) -> None:
        _check_run_options(top_k, scale_score, score_threshold)
        if "min_score" in (request_options or {}):
            raise ValueError("request_options: min_score goes by score_threshold")
        RequestOptions.of(request_options or {})  # type: ignore[arg-type]
        if isinstance(meta_fields_to_embed, str):
            raise TypeError(f"meta_fields_to_embed: a list of names is needed, not {meta_fields_to_embed!r}")
        self.model = model
        self._resolved = {model: ModelSpec(model).name}
        self.device = _device_name(device)
        self.top_k = top_k
        self.query_prefix = query_prefix
        self.document_prefix = document_prefix
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.scale_score = scale_score
        self.score_threshold = score_threshold
        self.model_options = model_options or {}
        self.pool_options = pool_options or {}
        self.request_options = request_options or {}

    @property
    def pool(self) -> RerankerPool | RerankerClient:
        """The pool that scores."""
        if is_url(self.model):
            return remote(self.model, self.device, "identity", **self.pool_options)
        name = self._resolved.get(self.model, self.model)
        spec = ModelSpec(name, activation="identity", **self.model_options)
        return shared_pool(spec, self.device, **self.pool_options)

    def warm_up(self) -> None:
        """Start the pool. Without it, the first ``run`` does."""
        self.pool.start()

    async def warm_up_async(self) -> None:
        """``warm_up`` while the loop goes on."""
        await asyncio.to_thread(self.warm_up)

    def to_dict(self) -> dict[str, Any]:
        """The parameters, as Haystack keeps them in YAML."""
        data: dict[str, Any] = default_to_dict(
            self,
            model=self.model,
            device=self.device,
            top_k=self.top_k,
            query_prefix=self.query_prefix,
            document_prefix=self.document_prefix,
            meta_fields_to_embed=self.meta_fields_to_embed,
            embedding_separator=self.embedding_separator,
            scale_score=self.scale_score,
            score_threshold=self.score_threshold,
            model_options=self.model_options,
            pool_options=self.pool_options,
            request_options=self.request_options,
        )
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PoolRanker:
        """The component that ``to_dict`` described."""
        ranker: PoolRanker = default_from_dict(cls, data)
        return ranker

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """The best documents, best first; ``None`` stands for the component's own setting.

        Raises:
            TypeError, ValueError: naming the argument and its value.
        """
        _check_run_options(top_k, scale_score, score_threshold)
        kept, texts = self._texts(documents)
        results = self.pool.rerank(self.query_prefix + query, texts, **self.request_options)
        return {"documents": self._ranked(kept, results, top_k, scale_score, score_threshold)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """``run`` while the loop goes on; no thread waits."""
        _check_run_options(top_k, scale_score, score_threshold)
        kept, texts = self._texts(documents)
        results = await self.pool.arerank(self.query_prefix + query, texts, **self.request_options)
        return {"documents": self._ranked(kept, results, top_k, scale_score, score_threshold)}

    def _texts(self, documents: list[Document]) -> tuple[list[Document], list[str]]:
        kept = list({document.id: document for document in reversed(documents)}.values())[::-1]
        texts = []
        for document in kept:
            fields = [str(document.meta[name]) for name in self.meta_fields_to_embed if document.meta.get(name)]
            texts.append(self.document_prefix + self.embedding_separator.join([*fields, document.content or ""]))
        return kept, texts

    def _ranked(
        self,
        documents: list[Document],
        results: list[RerankResult],
        top_k: int | None,
        scale_score: bool | None,
        score_threshold: float | None,
    ) -> list[Document]:
        scale = self.scale_score if scale_score is None else scale_score
        threshold = self.score_threshold if score_threshold is None else score_threshold
        logits = np.array([result.relevance_score for result in results], dtype=np.float64)  # None becomes nan
        scores = 1.0 / (1.0 + np.exp(-np.clip(logits, -700, 700))) if scale else logits
        ranked = [
            _scored(documents[result.index], None if np.isnan(score) else score, result)
            for result, score in zip(results, scores.tolist(), strict=True)
            if threshold is None or score >= threshold
        ]
        return ranked[: self.top_k if top_k is None else top_k]


def _scored(document: Document, score: float | None, result: RerankResult) -> Document:
    if result.passage is None:
        return replace(document, score=score)
    passage = result.document[slice(*result.passage)]
    return replace(document, score=score, meta={**document.meta, "relevant_passage": passage})


def _device_name(device: str | ComponentDevice | dict[str, Any] | None) -> str | None:
    if isinstance(device, dict):
        device = ComponentDevice.from_dict(device)
    if not isinstance(device, ComponentDevice):
        return None if device is None else str(device)
    try:
        name: str = device.to_torch_str()
    except ValueError as error:
        raise ValueError(f"device: one device is needed, not {device!r}: {error}") from error
    return name


def _check_run_options(top_k: int | None, scale_score: bool | None, score_threshold: float | None) -> None:
    check_optional_count("top_k", top_k)
    if scale_score is not None:
        check_flag("scale_score", scale_score)
    if score_threshold is not None and (
        not isinstance(score_threshold, (int, float)) or isinstance(score_threshold, bool)
    ):
        raise TypeError(f"score_threshold: a number is needed, not {score_threshold!r}")
