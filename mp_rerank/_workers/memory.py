"""Memory of a process, as psutil reads it."""

from __future__ import annotations

import psutil

from mp_rerank.results import WorkerMemory

__all__ = ["memory_of"]


def memory_of(pid: int, weights_bytes: int = 0, mapped_bytes: int = 0) -> WorkerMemory | None:
    """Memory of process ``pid``, beside what is known of the weights in it; ``None`` where it has ended.

    Where psutil cannot read it (a system without ``/proc``), all is 0.
    """
    try:
        process = psutil.Process(pid)
        try:
            full = process.memory_full_info()
            return WorkerMemory(pid, full.rss, full.uss, getattr(full, "pss", None), weights_bytes, mapped_bytes)
        except psutil.AccessDenied:
            return WorkerMemory(pid, process.memory_info().rss, None, None, weights_bytes, mapped_bytes)
    except psutil.NoSuchProcess:
        return None
    except (psutil.Error, OSError):
        return WorkerMemory(pid, 0, None, None, weights_bytes, mapped_bytes)
