"""A deployment whose workers stand still until they are told, and a clock that is set by hand."""

from __future__ import annotations

from concurrent.futures import Future

import pytest
from conftest import FAKE

from mp_rerank import PoolConfig
from mp_rerank._pairs import Pair
from mp_rerank._planning.plan import Seat
from mp_rerank._recipe import Recipe
from mp_rerank._scheduling.deployment import Deployment
from mp_rerank._scheduling.request import Request
from mp_rerank._workers import slot
from mp_rerank._workers.child import Scored, WorkerFacts
from mp_rerank.results import PoolStats

FACTS = WorkerFacts(1, "float32", 0.0, 0, 0, 1, None, (0.5, 0.5), 1000.0)


class Standing:
    """A worker that is ready once it is told, and scores when it is told."""

    killable = True
    left = False
    alive = False
    pid = 1

    def __init__(self) -> None:
        self.loaded: Future[None] = Future()
        self.described: Future[WorkerFacts] = Future()
        self.scoring: list[tuple[Future[Scored], int]] = []
        self.retired = False

    def describe(self, recipe: Recipe | None) -> Future[WorkerFacts]:
        return self.described

    def score(self, pairs: list[Pair], options: object) -> Future[Scored]:
        future: Future[Scored] = Future()
        self.scoring.append((future, len(pairs)))
        return future

    def resident_bytes(self) -> int | None:
        return None

    def get_ready(self) -> None:
        self.loaded.set_result(None)
        self.described.set_result(FACTS)

    def finish(self) -> None:
        future, pairs = self.scoring.pop(0)
        future.set_result(Scored(b"\0\0\0\0" * pairs, None, 0.01))

    def retire(self) -> None:
        self.retired = True

    kill = abandon = retire

    def join(self, timeout: float) -> None:
        pass


class House:
    """A deployment of seats whose workers stand still, and a clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seats: int, **options: object) -> None:
        self.made: list[Standing] = []
        self.now = 0.0
        monkeypatch.setattr(slot, "make_handle", self._make)
        self.counts = PoolStats()
        self.deployment = Deployment(
            FAKE,
            [Seat("cpu", 1)] * seats,
            PoolConfig.of({"slice_tokens": 100, "coalesce": False, **options}),
            lambda report: self.deployment.handle(report, self.now),
            lambda *_: None,
            self.counts,
        )
        self.deployment.start(0.0)

    def _make(self, *_: object) -> Standing:
        self.made.append(Standing())
        return self.made[-1]

    def submit(self, slices: int) -> Request:
        """Work for so many slices."""
        pairs = [("query", f"document {i}") for i in range(slices)]
        request = Request(pairs, [100] * slices, lambda scores, *_: scores.tolist())
        self.deployment.submit(request)
        self.step()
        return request

    def step(self, now: float | None = None) -> None:
        self.now = self.now if now is None else now
        self.deployment.tick(self.now)
        self.deployment.dispatch(self.now)

    def finish_all(self) -> None:
        while any(worker.scoring for worker in self.made):
            for worker in self.made:
                if worker.scoring:
                    worker.finish()
            self.step()

    @property
    def states(self) -> str:
        return " ".join(slot.state.value for slot in self.deployment.slots)
