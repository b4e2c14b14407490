"""The last minute, and the state of everything: for the page, ``mp-rerank top`` and ``mp_rerank.connect``."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import deque
from typing import Any

import mp_rerank
from mp_rerank.server.limits import Limits, Places
from mp_rerank.server.models import Models, ServedModel

__all__ = ["Live"]

WINDOW_SECONDS = 60.0
MAX_KEPT = 100_000
PERCENTILES = (50, 95, 99)
# Reading a process's memory takes the kernel about a millisecond for each worker.
MEMORY_SECONDS = 2.0


class Live:
    """Remembers the requests of the last minute, and describes the server."""

    def __init__(self, models: Models, limits: Limits, places: Places) -> None:
        self._models = models
        self._limits = limits
        self._places = places
        self._begun = time.time()
        self._recent: deque[tuple[float, float, int, bool]] = deque(maxlen=MAX_KEPT)
        self._memory: dict[str, Any] = {}
        self._memory_at = 0.0

    def add(self, seconds: float, pairs: int, *, ok: bool) -> None:
        """Remember a request that has ended."""
        self._recent.append((time.monotonic(), seconds, pairs, ok))

    def recent(self) -> dict[str, Any]:
        """Rates and latencies of the last minute, or of as long as the server has lived."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - WINDOW_SECONDS:
            self._recent.popleft()
        window = max(1.0, min(WINDOW_SECONDS, time.time() - self._begun))
        good = [entry for entry in self._recent if entry[3]]
        times = sorted(entry[1] for entry in good)
        return {
            "window_seconds": window,
            "requests_per_second": len(good) / window,
            "pairs_per_second": sum(entry[2] for entry in good) / window,
            "refused_per_second": (len(self._recent) - len(good)) / window,
            "latency_seconds": {
                f"p{percent}": times[min(len(times) - 1, len(times) * percent // 100)] if times else None
                for percent in PERCENTILES
            },
        }

    async def status(self, name: str | None = None) -> dict[str, Any]:
        """Everything, of all models or of one; raises `Refused` for one that is not served."""
        chosen = list(self._models) if name is None else [self._models.find(name)]
        await self._measure()
        return {
            "version": mp_rerank.__version__,
            "ready": self._models.ready,
            "uptime_seconds": time.time() - self._begun,
            "requests": self._places.taken,
            "recent": self.recent(),
            "limits": dataclasses.asdict(self._limits),
            "models": [self._describe(model) for model in chosen],
        }

    def _describe(self, model: ServedModel) -> dict[str, Any]:
        return {
            "model": model.name,
            "state": "failed" if model.failed else "ready" if model.ready else "loading",
            "num_labels": model.num_labels,
            "max_length": model.max_length,
            "dtype": model.dtype,
            "activation": model.own_activation,
            "stats": dataclasses.asdict(model.pool.stats()),
            "workers": [dataclasses.asdict(worker) for worker in model.pool.workers()],
            "memory": self._memory.get(model.name),
        }

    async def _measure(self) -> None:
        """Have the memory read, on another thread, unless that was done lately."""
        if time.monotonic() - self._memory_at < MEMORY_SECONDS:
            return
        self._memory_at = time.monotonic()

        def read() -> dict[str, Any]:
            models = list(self._models)
            return {model.name: dataclasses.asdict(model.pool.memory()) for model in models}

        self._memory = await asyncio.to_thread(read)
