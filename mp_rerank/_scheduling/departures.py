"""Workers that were let go, until they have ended: they finish what they have, and are killed if they outstay it.

What they were forked from, their template, ends after them: it is their parent. Runs on the dispatcher's thread alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

from mp_rerank._workers.handle import Templates, WorkerHandle
from mp_rerank._workers.logs import POOL_LOGGER, QueuedLogger

__all__ = ["GRACE_SECONDS", "Departures"]

logger = QueuedLogger(POOL_LOGGER)

# A worker told to leave is killed after so many seconds: it has nothing to lose.
GRACE_SECONDS = 5.0
# How soon a template follows the last of its workers.
LOOK_SECONDS = 0.1


class Departures:
    """The workers of one model that were told to leave, and the template behind them, if there is one.

    Args:
        templates: what the workers are forked from.
    """

    def __init__(self, templates: Templates | None) -> None:
        self._templates = templates
        self._leaving: list[tuple[WorkerHandle, float]] = []  # and when to kill each
        self._last = False  # whether no other worker will follow
        self._look_again: float | None = None  # whether the workers have ended, and their template may

    def let_go(self, worker: WorkerHandle, now: float) -> None:
        """Tell ``worker`` to finish what it is running, and to end."""
        worker.retire()
        self._leaving.append((worker, now + GRACE_SECONDS))

    def close(self, now: float) -> None:
        """No worker will be started any more: the template ends once those that leave have ended."""
        self._last = True
        if self._templates is not None:
            self._look_again = now

    def tick(self, now: float) -> None:
        """Forget those that have ended, kill those whose time is over."""
        self._leaving = [(worker, limit) for worker, limit in self._leaving if worker.alive]
        for i, (worker, limit) in enumerate(self._leaving):
            if now >= limit:
                worker.kill()
                self._leaving[i] = (worker, math.inf)
        if self._last and self._templates is not None:
            self._look_again = now + LOOK_SECONDS if self._leaving else None
            if not self._leaving:
                self._templates.close()

    def wake_at(self) -> Iterator[float | None]:
        """When ``tick`` has something to do."""
        yield self._look_again
        for _, limit in self._leaving:
            yield limit

    @property
    def alive(self) -> bool:
        """Whether one of them has not ended yet, or the template."""
        if self._templates is not None and self._templates.alive:
            return True
        return any(worker.alive for worker, _ in self._leaving)

    def join(self) -> None:
        """Wait until every one has ended, killing those that outstay their grace."""
        for worker, limit in self._leaving:
            worker.join(max(0.0, limit - time.monotonic()) if limit < math.inf else GRACE_SECONDS)
            if worker.alive:
                worker.kill()
                worker.join(GRACE_SECONDS)
            if worker.alive:
                logger.error(
                    "process %s was killed and has not ended: it is not waited for any more "
                    "[mp-rerank explain process-not-ended]",
                    worker.pid,
                )
                worker.abandon()
        self._leaving.clear()
        if self._templates is not None:
            self._templates.close()
            self._templates.join(GRACE_SECONDS)
            if self._templates.alive:
                logger.error(
                    "a template was killed and has not ended: it is not waited for any more "
                    "[mp-rerank explain process-not-ended]"
                )
