"""What an operator says: which models, where to listen, who may ask for how much."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mp_rerank._wire import CALLER_HEADER
from mp_rerank.config import ModelSpec
from mp_rerank.server.keys import Keys
from mp_rerank.server.limits import Limits

__all__ = ["LOOPBACK", "ServerConfig"]

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerConfig:
    """A server.

    Attributes:
        models: what is served, by the names clients know.
        aliases: other names for these.
        memory: the bound on all workers' memory, as for ``ModelPools``.
        pool: keywords of ``RerankerPool``, for every model.
        host, port: where to listen; port 0: any.
        uds: a path to listen at in place of these.
        uds_mode: the permissions of that socket.
        keys: who may ask; nobody in it: everybody.
        caller_header: where clients without a key name their caller.
        hosts: accepted in the header ``Host``; ``None``: any. Behind a name that leads to a loopback address a browser
            would carry any page's requests here.
        origins: pages of these may ask (CORS); nobody's by default.
        limits: bounds.
        access_log: whether each request is logged.
    """

    models: Mapping[str, ModelSpec]
    aliases: Mapping[str, str] = field(default_factory=dict)
    memory: int | str = "8GiB"
    pool: Mapping[str, Any] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8080
    uds: str | None = None
    uds_mode: int = 0o660
    keys: Keys = field(default_factory=lambda: Keys([]))
    caller_header: str = CALLER_HEADER
    hosts: frozenset[str] | None = None
    origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    access_log: bool = False

    @property
    def pool_options(self) -> dict[str, Any]:
        """Keywords of ``RerankerPool``, with those that bound what is pending: at the bound requests are refused."""
        return {
            "max_pending_pairs": self.limits.pending_pairs,
            "max_pending_pairs_per_caller": self.limits.pending_pairs_per_caller,
            "overload": "raise",
            **self.pool,
        }
