"""A server in place of a model's name: adapters take its URL, and have its model scored there."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from mp_rerank.client import RerankerClient, connect

__all__ = ["is_url", "remote"]


def is_url(model: object) -> bool:
    """Whether ``model`` is the URL of a server, and no name."""
    return isinstance(model, str) and model.startswith(("http://", "https://", "unix:"))


def remote(url: str, device: object = None, activation: str | None = None, **options: Any) -> RerankerClient:
    """The process's client of the server at ``url``; one for each activation and options.

    Args:
        device: must be ``None``: it is the server's.
        activation, options: as for ``connect``.

    Raises:
        ValueError: a device is asked for.
        TypeError: ``connect`` has no such option.
    """
    if device is not None:
        raise ValueError(f"device: it is the server's, {url}; it must be None, not {device!r}")
    return _shared(url, activation, tuple(sorted(options.items())))


@lru_cache(maxsize=64)
def _shared(url: str, activation: Any, options: tuple[tuple[str, Any], ...]) -> RerankerClient:
    return connect(url, activation=activation, **dict(options))
