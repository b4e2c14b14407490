"""Rerank documents with a cross-encoder from any number of threads: a pool of worker processes, each with its own
model.

    from mp_rerank import RerankerPool

    with RerankerPool() as pool:
        for result in pool.rerank("how do birds fly?", ["Wings give lift.", "Bread is baked."]):
            print(result.relevance_score, result.document)

Names are imported when they are first used: every worker process imports this package on its way to its own module, and
must not meet anything heavy before its threads are set.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mp_rerank.client import RerankerClient, connect
    from mp_rerank.config import ModelSpec, PoolConfig
    from mp_rerank.errors import (
        ClusterError,
        ModelLoadError,
        PoolClosedError,
        PoolOverloadedError,
        RequestTimeoutError,
        RerankError,
        ScoringError,
        TextTooLongError,
        WorkerCrashedError,
    )
    from mp_rerank.model_pools import ModelPools
    from mp_rerank.pool import RerankerPool
    from mp_rerank.results import (
        CallerStats,
        KeptModel,
        ModelPoolsStats,
        PoolMemory,
        PoolStats,
        RerankResult,
        WorkerExit,
        WorkerInfo,
        WorkerMemory,
    )
    from mp_rerank.shared import shared_pool

__version__ = "0.1.0"

__all__ = [
    "CallerStats",
    "ClusterError",
    "KeptModel",
    "ModelLoadError",
    "ModelPools",
    "ModelPoolsStats",
    "ModelSpec",
    "PoolClosedError",
    "PoolConfig",
    "PoolMemory",
    "PoolOverloadedError",
    "PoolStats",
    "RequestTimeoutError",
    "RerankError",
    "RerankResult",
    "RerankerClient",
    "RerankerPool",
    "ScoringError",
    "TextTooLongError",
    "WorkerCrashedError",
    "WorkerExit",
    "WorkerInfo",
    "WorkerMemory",
    "connect",
    "shared_pool",
]

_MODULES = ("errors", "config", "results", "pool", "model_pools", "shared", "client")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = _import(module)
            if name in found.__all__:
                globals()[name] = getattr(found, name)
                return globals()[name]
    raise AttributeError(f"module 'mp_rerank' has no attribute {name!r}")


def _import(module: str) -> Any:
    try:
        return import_module(f"mp_rerank.{module}")
    except Exception as error:
        from mp_rerank._shadowing import shadowing

        # An AttributeError would be taken for a name that this package lacks.
        raise ImportError(f"mp_rerank.{module}: {type(error).__name__}: {error}{shadowing(error)}") from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
