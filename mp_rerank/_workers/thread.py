"""A worker on a thread of this process: a ``ThreadPoolExecutor(1)``, so one model and one prediction at a time."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor

from mp_rerank._recipe import Recipe
from mp_rerank._workers.child import Launch, LoadedModel, Options, Pairs, Scored, WorkerFacts
from mp_rerank._workers.green import make_queue

__all__ = ["ThreadHandle"]


class ThreadHandle:
    """A worker on a thread. See ``handle.WorkerHandle``.

    The thread ends by itself after the slice it is running, and nothing waits for it.
    """

    killable = False
    left = False
    alive = False

    def __init__(self, launch: Launch) -> None:
        self._model = LoadedModel(launch)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=launch.name, initializer=self._model.load)
        # The executor takes whichever queue is there, which under a half monkey-patched library is another thread's.
        self._executor._work_queue = make_queue()
        self.loaded: Future[None] = self._executor.submit(self._model.loaded)
        self.pid: int | None = os.getpid()

    def describe(self, recipe: Recipe | None) -> Future[WorkerFacts]:
        return self._executor.submit(self._model.describe, recipe)

    def score(self, pairs: Pairs, options: Options = None) -> Future[Scored]:
        return self._executor.submit(self._model.score, pairs, options)

    def resident_bytes(self) -> int | None:
        return None  # of this process, which is the caller's

    def kill(self) -> None:
        pass

    def retire(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def abandon(self) -> None:
        pass

    def join(self, timeout: float) -> None:
        pass
