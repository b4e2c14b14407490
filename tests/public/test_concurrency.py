"""Right under concurrency: whatever is asked at the same time, everybody gets the scores of a serial run."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import PATIENCE

from mp_rerank import RerankerPool

pytest.importorskip("torch")
models = pytest.importorskip("models")
pytestmark = pytest.mark.real

AGENTS = 64
ROUNDS = 20

QUERIES = models.TEXT[:5]
DOCUMENTS = ["", *models.TEXT, *(" ".join(line.split()[i : i + 3]) for line in models.TEXT for i in range(5))]

Table = npt.NDArray[np.float32]


class Serial:
    """A model, and its scores of every query with every document, one after another."""

    def __init__(self, folder: str, device: str) -> None:
        self.folder = folder
        model = models.load(folder, device)
        self.table: Table = model.predict([(q, d) for q in QUERIES for d in DOCUMENTS]).reshape(len(QUERIES), -1)
        assert self.table.std() > 0.01


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, device: str) -> Serial:
    return Serial(models.build("bert", tmp_path_factory.mktemp("bert")), device)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, device: str) -> Serial:
    return Serial(models.build("llama", tmp_path_factory.mktemp("llama")), device)


@pytest.fixture(scope="module", params=[1, 2, 4], ids=lambda count: f"{count} workers")
def pool(request: pytest.FixtureRequest, bert: Serial, device: str, fork_server: str) -> Iterator[RerankerPool]:
    # Many agents ask for the same pairs here: with two workers equal ones are scored once, else each for itself.
    coalesce = request.param == 2
    options = {"threads_per_worker": 1, "batch_tokens": 512, "coalesce": coalesce, "start_method": fork_server}
    with RerankerPool(bert.folder, devices=device, workers=request.param, **options) as pool:
        yield pool


def close(scores: Any, expected: Any) -> bool:
    return np.shape(scores) == np.shape(expected) and np.allclose(scores, expected, rtol=1e-5, atol=1e-5)


class Ask:
    """One random request, and whether what comes back is right."""

    def __init__(self, chance: random.Random, table: Table) -> None:
        self.kind = chance.choice(["submit", "rerank", "pairs", "predict"])
        self.query = chance.randrange(len(QUERIES))
        self.documents = [chance.randrange(len(DOCUMENTS)) for _ in range(chance.choice([0, 1, 2, 5, 20]))]
        self.queries = [chance.randrange(len(QUERIES)) for _ in self.documents]
        self.priority = chance.choice([-2, 0, 0, 3])
        self.table = table

    @property
    def texts(self) -> list[str]:
        return [DOCUMENTS[i] for i in self.documents]

    def ask(self, pool: RerankerPool) -> None:
        pairs = [(QUERIES[q], text) for q, text in zip(self.queries, self.texts, strict=True)]
        if self.kind == "submit":
            future = pool.submit(QUERIES[self.query], self.texts, priority=self.priority)
            self.check_ranking(future.result(PATIENCE))
        elif self.kind == "rerank":
            self.check_ranking(pool.rerank(QUERIES[self.query], self.texts))
        elif self.kind == "pairs":
            self.check_scores(pool.submit_pairs(pairs, priority=self.priority).result(PATIENCE))
        else:
            self.check_scores(pool.predict(pairs))

    async def aask(self, pool: RerankerPool) -> None:
        self.check_ranking(await pool.arerank(QUERIES[self.query], self.texts, priority=self.priority))

    def check_ranking(self, results: list[Any]) -> None:
        assert sorted(result.index for result in results) == list(range(len(self.documents)))
        assert [result.document for result in results] == [self.texts[result.index] for result in results]
        scores = [result.relevance_score for result in results]
        assert scores == sorted(scores, reverse=True)
        assert close(scores, [self.table[self.query, self.documents[result.index]] for result in results])

    def check_scores(self, scores: Any) -> None:
        assert close(scores, [self.table[q, d] for q, d in zip(self.queries, self.documents, strict=True)])


def stress(ask: Callable[[random.Random, int], None]) -> None:
    """``AGENTS`` threads, ``ROUNDS`` times, each time all at once."""
    together = threading.Barrier(AGENTS)

    def agent(number: int) -> None:
        for turn in range(ROUNDS):
            together.wait(PATIENCE)
            try:
                ask(random.Random(f"{number} {turn}"), number)
            except BaseException:
                together.abort()
                raise

    with ThreadPoolExecutor(AGENTS) as agents:
        done = [agents.submit(agent, number) for number in range(AGENTS)]
        errors = [error for future in done if (error := future.exception(PATIENCE * 4)) is not None]
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    assert not errors


def nothing_is_left(pool: RerankerPool) -> bool:
    stats = pool.stats()
    answered = stats.pending_requests == stats.pending_pairs == stats.failed == 0
    return answered and stats.completed == stats.submitted


def test_one_after_another(pool: RerankerPool, bert: Serial) -> None:
    for number in range(AGENTS):
        Ask(random.Random(number), bert.table).ask(pool)
    assert nothing_is_left(pool)


def test_64_threads_20_times(pool: RerankerPool, bert: Serial) -> None:
    before = pool.stats()
    stress(lambda chance, number: Ask(chance, bert.table).ask(pool))
    after = pool.stats()
    assert nothing_is_left(pool)
    assert after.gathered_slices > before.gathered_slices
    assert after.crashes == 0


@pytest.mark.parametrize("pool", [2], indirect=True, ids=["2 workers"])
def test_two_pools_of_different_models_with_asyncio_and_threads_mixed(
    pool: RerankerPool, bert: Serial, llama: Serial, device: str, fork_server: str
) -> None:
    assert not np.allclose(bert.table, llama.table, atol=0.05)
    options = {"threads_per_worker": 1, "batch_tokens": 512, "start_method": fork_server}
    with RerankerPool(llama.folder, devices=device, workers=1, **options) as other:
        choices = [(pool, bert), (other, llama)]

        async def tasks() -> None:
            chance = random.Random("asyncio")
            for _ in range(ROUNDS):
                asked = [chance.choice(choices) for _ in range(AGENTS)]
                await asyncio.gather(*(Ask(chance, serial.table).aask(asked_pool) for asked_pool, serial in asked))

        def ask(chance: random.Random, number: int) -> None:
            asked_pool, serial = chance.choice(choices)
            Ask(chance, serial.table).ask(asked_pool)

        with ThreadPoolExecutor(1) as loop:
            looping = loop.submit(lambda: asyncio.run(tasks()))
            stress(ask)
            looping.result(PATIENCE * 4)
        assert nothing_is_left(pool)
        assert nothing_is_left(other)
