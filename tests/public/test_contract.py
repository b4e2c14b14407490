"""What a pool promises, whatever its workers are: spawned processes, processes forked by a server or by a template that
has loaded the model, a thread, or a Dask cluster's.

And wherever it is: ``http`` is a client of a server.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import PATIENCE, START_METHODS, Fifo, until
from fakes import score_of, scores_of

from mp_rerank import ModelSpec, PoolClosedError, RerankerPool, RerankResult, ScoringError

MakePool = Callable[..., RerankerPool]
THREE_LABELS = ModelSpec("three", loader="fakes:load_three_labels")


KINDS: dict[str, dict[str, Any]] = {
    "process": {"start_method": "spawn"},
    "forked process": {"start_method": "forkserver"},
    "forked from the model": {"start_method": "fork-model"},
    "thread": {"isolation": "thread"},
    "cluster": {"cluster": ...},
    "process and cluster": {"cluster": ..., "workers": 1},
    "http": {"over": "http"},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, Any]:
    if request.param == "forked process":
        request.getfixturevalue("fork_server")
    if "cluster" in request.param:
        seats = 2 - KINDS[request.param].get("workers", 0)
        return {**KINDS[request.param], "cluster": request.getfixturevalue("dask_clusters")[seats]}
    if KINDS[request.param].get("start_method") not in (None, *START_METHODS):
        pytest.skip("not on this system")
    return KINDS[request.param]


@pytest.fixture
def pool(make_pool: MakePool, kind: dict[str, Any]) -> Iterator[RerankerPool]:
    with make_pool(**kind) as pool:
        yield pool


def expected(query: str, documents: list[str]) -> list[RerankResult]:
    scores = scores_of(query, documents)
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    return [RerankResult(i, scores[i], documents[i]) for i in order]


def test_documents_come_back_ranked_with_their_scores_and_places(pool: RerankerPool) -> None:
    documents = [f"document {i}" for i in range(50)]
    assert pool.submit("query", documents).result(PATIENCE) == expected("query", documents)


def test_top_n_keeps_the_best(pool: RerankerPool) -> None:
    documents = [f"document {i}" for i in range(10)]
    best = expected("query", documents)
    assert pool.rerank("query", documents, top_n=3) == best[:3]
    assert pool.rerank("query", documents, top_n=100) == best
    assert pool.rerank("query", documents, top_n=0) == []


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_any_number_of_documents(pool: RerankerPool, count: int) -> None:
    documents = [f"document {i}" for i in range(count)]
    assert pool.rerank("query", documents) == expected("query", documents)


def test_equal_scores_keep_the_order_submitted(pool: RerankerPool) -> None:
    ranked = pool.rerank("query", ["same", "other", "same", "same"])
    assert [r.index for r in ranked if r.document == "same"] == [0, 2, 3]


def test_any_text_is_a_document(pool: RerankerPool) -> None:
    documents = ["", " ", "\0", "naïve", "文書", "🙂", "\ud800", "x" * 200_000]
    assert pool.rerank("", documents) == expected("", documents)


def test_a_generator_of_documents_will_do(pool: RerankerPool) -> None:
    assert len(pool.rerank("query", (f"document {i}" for i in range(7)))) == 7


def test_subclasses_of_str_are_scored_as_text_and_given_back_as_they_are(pool: RerankerPool) -> None:
    class Tagged(str):
        __slots__ = ()

        def __reduce__(self) -> str:
            raise AssertionError("a document's own pickling was used")

    document = Tagged("text")
    [result] = pool.rerank("query", [document])
    assert result.document is document
    assert result.relevance_score == score_of("query", "text")


def test_pairs_of_any_queries(pool: RerankerPool) -> None:
    pairs = [(f"query {i % 7}", f"document {i}") for i in range(100)]
    scores = pool.submit_pairs(pairs).result(PATIENCE)
    assert scores.dtype == np.float32
    assert scores.tolist() == [score_of(*pair) for pair in pairs]
    assert pool.submit_pairs([]).result(PATIENCE).shape == (0,)


def test_several_labels_are_scored_and_not_ranked(make_pool: MakePool, kind: dict[str, Any]) -> None:
    with make_pool(THREE_LABELS, **kind) as pool:
        pairs = [("query", "d" * i) for i in range(9)]
        scores = pool.submit_pairs(pairs).result(PATIENCE)
        assert scores.shape == (9, 3)
        assert scores[:, 2].tolist() == list(range(9))
        assert pool.submit_pairs([]).result(PATIENCE).shape == (0, 3)
        softmax = pool.predict(pairs, apply_softmax=True)
        assert np.allclose(softmax.sum(axis=1), 1.0)
        with pytest.raises(ValueError, match="3 scores a pair"):
            pool.submit("query", ["document"])


def test_it_stands_in_for_a_cross_encoder(pool: RerankerPool) -> None:
    documents = ["a", "b", "c"]
    scores = scores_of("query", documents)
    predicted = pool.predict([("query", d) for d in documents], batch_size=2, show_progress_bar=False, prompt=None)
    assert predicted.tolist() == scores
    assert pool.predict(["query", "a"]) == np.float32(scores[0])
    assert pool.predict(sentences=[["query", "a"]]).tolist() == scores[:1]
    assert pool.predict([]).shape == (0,)
    best = max(range(3), key=lambda i: scores[i])
    assert pool.rank("query", documents, top_k=1) == [{"corpus_id": best, "score": scores[best]}]
    assert pool.rank("query", documents, return_documents=True)[0]["text"] == documents[best]


def test_slices_follow_what_workers_count(make_pool: MakePool, kind: dict[str, Any]) -> None:
    """Where texts have fewer tokens than was estimated, a slice soon holds more of them."""
    documents = [f"document number {i:04}" for i in range(800)]
    slices = {}
    for counting in (False, True):
        spec = ModelSpec("fake", loader=f"fakes:load{'_counting' * counting}")
        with make_pool(spec, slice_tokens=200, **kind) as pool:
            assert pool.submit("query", documents).result(PATIENCE) == expected("query", documents)
            slices[counting] = pool.stats().slices
    assert slices[True] < slices[False] / 1.5


def test_a_document_the_model_raises_on_fails_its_request_alone(pool: RerankerPool, kind: dict[str, Any]) -> None:
    bad = pool.submit("query", ["good", "!raise too odd", "fine"])
    good = [pool.submit("query", [f"document {i}"]) for i in range(20)]
    with pytest.raises(ScoringError, match=r"document 1 .* too odd") as caught:
        bad.result(PATIENCE)
    assert caught.value.document_index == 1
    assert caught.value.device == "cpu"
    assert "ValueError: too odd" in caught.value.details
    assert [f.result(PATIENCE)[0].index for f in good] == [0] * 20


def test_sys_exit_in_the_model_is_an_error_like_any_other(pool: RerankerPool) -> None:
    with pytest.raises(ScoringError, match="SystemExit: 7"):
        pool.rerank("query", ["!sys.exit"])
    assert pool.rerank("query", ["document"])


def test_many_threads_each_get_their_own_scores(pool: RerankerPool) -> None:
    def agent(seed: int) -> None:
        chance = random.Random(seed)
        for turn in range(5):
            documents = [f"{seed} {turn} {i}" for i in range(chance.choice([0, 1, 10, 200]))]
            assert pool.rerank(f"query {seed}", documents) == expected(f"query {seed}", documents)

    with concurrent.futures.ThreadPoolExecutor(32) as agents:
        for done in [agents.submit(agent, seed) for seed in range(32)]:
            done.result(PATIENCE)
    stats = pool.stats()
    assert stats.pending_requests == stats.pending_pairs == 0
    assert stats.completed == stats.submitted


def test_asyncio_and_threads_at_once(pool: RerankerPool) -> None:
    documents = [f"document {i}" for i in range(30)]

    async def agents() -> list[list[RerankResult]]:
        return await asyncio.gather(*(pool.arerank(f"query {i}", documents) for i in range(20)))

    with concurrent.futures.ThreadPoolExecutor(1) as other:
        threaded = other.submit(lambda: [pool.rerank(f"query {i}", documents) for i in range(20)])
        awaited = asyncio.run(agents())
        assert awaited == threaded.result(PATIENCE) == [expected(f"query {i}", documents) for i in range(20)]


def test_a_cancelled_task_cancels_its_request(pool: RerankerPool, fifo: Fifo) -> None:
    async def agent() -> None:
        task = asyncio.ensure_future(pool.arerank("query", [fifo.order, *(f"document {i}" for i in range(900))]))
        await asyncio.to_thread(fifo.wait_until_read)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(agent())
    until(lambda: pool.stats().cancelled == 1)  # a server hears of it later
    assert pool.stats().pending_pairs == 0
    fifo.release()


def test_callbacks_run_apart_and_may_submit(pool: RerankerPool) -> None:
    stop = threading.Event()
    inner: concurrent.futures.Future[list[RerankResult]] = concurrent.futures.Future()
    sleeper, raiser = pool.submit("query", ["a"]), pool.submit("query", ["b"])
    submitter = pool.submit("query", ["c"])
    sleeper.add_done_callback(lambda _: stop.wait(PATIENCE))
    with contextlib.suppress(SystemExit):  # of a future that is done already it runs here, as the standard library's
        raiser.add_done_callback(lambda _: (_ for _ in ()).throw(SystemExit("from a callback")))
    submitter.add_done_callback(lambda _: inner.set_result(pool.rerank("query", ["d"])))
    assert inner.result(PATIENCE) == expected("query", ["d"])
    assert pool.rerank("query", ["e"]) == expected("query", ["e"])
    stop.set()


def test_workers_say_who_they_are(pool: RerankerPool, kind: dict[str, Any]) -> None:
    workers = pool.workers()
    assert len(workers) == (1 if "isolation" in kind else 2)
    assert {w.state for w in workers} == {"ready"}
    assert {w.generation for w in workers} == {1}
    assert {w.device for w in workers} == {"cpu"}
    assert len({w.canary for w in workers}) == 1
    assert len({w.pid for w in workers}) == len(workers)
    memory = pool.memory()
    assert [m.pid for m in memory.workers] == [w.pid for w in workers]
    assert all(m.rss > 0 for m in (memory.parent, *memory.workers))


def test_a_closed_pool_says_so(make_pool: MakePool, kind: dict[str, Any]) -> None:
    if "over" in kind:
        pytest.skip("a client's end is not its server's: see tests/server/test_client.py")
    pool = make_pool(**kind)
    assert pool.workers() == []
    pool.start()
    pending = [pool.submit("query", [f"document {i}"]) for i in range(10)]
    pool.close()
    assert all(f.done() for f in pending)
    assert [f.result()[0].index for f in pending] == [0] * 10
    for call in (lambda: pool.submit("q", ["d"]), lambda: pool.submit("q", []), pool.start, lambda: pool.predict([])):
        with pytest.raises(PoolClosedError, match="closed"):
            call()
    assert pool.stats().completed == 10
    assert {w.state for w in pool.workers()} == {"closed"}
    pool.close()


def test_the_first_request_starts_the_pool(make_pool: MakePool, kind: dict[str, Any]) -> None:
    pool = make_pool(**kind)
    assert "not started" in repr(pool)
    assert asyncio.run(pool.arerank("query", ["document"])) == expected("query", ["document"])
    assert "ready" in repr(pool)
