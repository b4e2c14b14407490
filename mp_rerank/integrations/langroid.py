"""Langroid: `install` lets every ``DocChatAgent`` rerank in a pool, at the same time; `PoolRerankMixin` some of them.

    from mp_rerank.integrations import langroid

    langroid.install()          # before or after agents are made; their code stays as it is

    class MyAgent(langroid.PoolRerankMixin, DocChatAgent): ...      # or only these

Langroid (0.69) has one ``CrossEncoder`` for each model and device, behind a lock: agents wait for each other.
``install`` replaces the function that looks it up. The new one returns the process's shared pool, and a lock that does
nothing.

The configuration keeps its meaning. ``cross_encoder_reranking_model`` names the model (``"builtin"`` and the URL of a
server work too), and ``cross_encoder_device`` the device. ``None`` means the best device, with one difference: ``None``
and ``"cuda"`` mean every visible GPU, not only the first. Langroid takes the scores of ``CrossEncoder.predict``, after
the model's activation, and applies a sigmoid of its own before it sorts, also after ``install``. The mixin sorts by the
scores themselves, which is the same order. Passages are returned unchanged.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any, ClassVar

from langroid.agent.special import doc_chat_agent
from langroid.mytypes import Document

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank.client import RerankerClient
from mp_rerank.integrations._remote import is_url, remote
from mp_rerank.pool import RerankerPool
from mp_rerank.shared import shared_pool

__all__ = ["PoolRerankMixin", "install", "uninstall"]

_original = getattr(doc_chat_agent, "_get_cross_encoder_entry", None)


class _Predicting:
    """What an agent takes for its cross-encoder: a pool, with options of each request."""

    def __init__(self, pool: RerankerPool | RerankerClient, options: RequestKeywords) -> None:
        self._pool = pool
        self._options = options

    def predict(self, pairs: list[tuple[str, str]], *, show_progress_bar: bool | None = None) -> Any:
        del show_progress_bar
        return self._pool.submit_pairs(pairs, **self._options).result()


def install(request_options: RequestKeywords | None = None, **options: Any) -> None:
    """Let every ``DocChatAgent`` use the process's shared pool. A second call replaces the options.

    Args:
        request_options: options of ``RerankerPool.submit_pairs`` for every agent, such as ``instruction``.
        options: keywords of ``shared_pool``, for every model.

    Raises:
        RuntimeError: this version of Langroid looks up its cross-encoders in another way.
    """
    entry_type = getattr(doc_chat_agent, "_CrossEncoderCacheEntry", None)
    parameters = [] if _original is None else list(inspect.signature(_original).parameters)
    if entry_type is None or parameters != ["model_name", "device"]:
        raise RuntimeError(
            "this version of Langroid has no cache of cross-encoders that is known here (0.69 has); "
            "use PoolRerankMixin in place of install()"
        )

    RequestOptions.of(request_options or {})

    def get_entry(model_name: str, device: str | None) -> Any:
        pool = _pool(model_name, device, options)
        return entry_type(model=_Predicting(pool, request_options) if request_options else pool, lock=nullcontext())

    doc_chat_agent._get_cross_encoder_entry = get_entry


def _pool(model_name: str, device: str | None, options: dict[str, Any]) -> RerankerPool | RerankerClient:
    if is_url(model_name):
        return remote(model_name, device, **options)
    return shared_pool(model_name, device, **options)


def uninstall() -> None:
    """Undo ``install``. The pools stay, for those who use them."""
    if _original is not None:
        doc_chat_agent._get_cross_encoder_entry = _original


class PoolRerankMixin:
    """A base class to name before ``DocChatAgent``. It uses none of Langroid's private names.

    Attributes:
        pool_options: keywords of ``shared_pool``.
        request_options: options of ``RerankerPool.submit``, such as ``instruction``, ``min_score`` and ``caller``.
    """

    pool_options: ClassVar[dict[str, Any]] = {}
    request_options: ClassVar[RequestKeywords] = {}
    config: Any

    def rerank_with_cross_encoder(self, query: str, passages: list[Document]) -> list[Document]:
        """The passages, best first."""
        pool = _pool(self.config.cross_encoder_reranking_model, self.config.cross_encoder_device, self.pool_options)
        ranked = pool.rerank(query, [passage.content for passage in passages], **self.request_options)
        return [passages[result.index] for result in ranked]
