"""Equal pairs that are pending together are scored once, and what becomes of one request is nothing to the others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import PATIENCE, Fifo, ranked, until
from fakes import score_of, scores_of

from mp_rerank import (
    ModelSpec,
    PoolClosedError,
    PoolOverloadedError,
    RequestTimeoutError,
    RerankerPool,
    ScoringError,
    WorkerCrashedError,
)

MakePool = Callable[..., RerankerPool]

SALTED = ModelSpec("salted", loader="fakes:load_salted")
THREE = ModelSpec("three", loader="fakes:load_three_labels")


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


def salted(query: str, texts: list[str]) -> list[float]:
    return scores_of("salted " + query, texts)


@pytest.fixture
def notes(tmp_path: Path) -> list[str]:
    """Documents that leave a mark each time a model scores them."""
    return [f"!note {tmp_path / f'note {i}'}" for i in range(12)]


def marks(notes: list[str]) -> set[int]:
    """How often they have been scored."""
    return {len(Path(note.partition(" ")[2]).read_text()) for note in notes}


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_agents_that_ask_alike_have_it_scored_once(
    make_pool: MakePool, fifo: Fifo, notes: list[str], isolation: str
) -> None:
    with make_pool(workers=1, isolation=isolation, slice_tokens=60) as pool:
        gate = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        futures = [pool.submit("query", notes[i:] + notes[:i]) for i in range(8)]
        others = [pool.submit(f"query {i}", documents(3)) for i in range(4)]  # the same documents, other pairs
        fifo.release()
        for i, future in enumerate(futures):
            assert future.result(PATIENCE) == ranked("query", notes[i:] + notes[:i])
        assert [f.result(PATIENCE) for f in others] == [ranked(f"query {i}", documents(3)) for i in range(4)]
        assert gate.result(PATIENCE)
        stats = pool.stats()
    assert marks(notes) == {1}
    assert (stats.scored_pairs, stats.coalesced_pairs, stats.cached_pairs) == (1 + 12 + 12, 7 * 12, 0)
    assert (stats.completed, stats.pending_requests, stats.pending_pairs) == (13, 0, 0)


def test_unless_that_is_not_wanted(make_pool: MakePool, fifo: Fifo, notes: list[str]) -> None:
    with make_pool(workers=1, coalesce=False) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        futures = [pool.submit("query", notes) for _ in range(3)]
        fifo.release()
        assert [future.result(PATIENCE) for future in futures] == [ranked("query", notes)] * 3
        assert pool.stats().coalesced_pairs == 0
    assert marks(notes) == {3}


def test_a_document_twice_in_a_request(make_pool: MakePool, notes: list[str]) -> None:
    with make_pool() as pool:
        doubled = [*notes, "other", *notes]
        assert pool.rerank("query", doubled) == ranked("query", doubled)
        assert pool.rerank("query", ["same"] * 1000, top_n=3) == ranked("query", ["same"] * 1000)[:3]
        stats = pool.stats()
    assert marks(notes) == {1}
    assert (stats.scored_pairs, stats.coalesced_pairs) == (14, 12 + 999)


def test_one_that_comes_while_it_is_being_scored(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool() as pool:
        first = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        second = pool.submit("query", [*documents(3), fifo.order])
        until(lambda: pool.stats().scored_pairs == 3)
        assert not second.done()
        fifo.release()
        assert first.result(PATIENCE) == ranked("query", [fifo.order])
        assert second.result(PATIENCE) == ranked("query", [*documents(3), fifo.order])
        assert pool.stats().scored_pairs == 4


def test_the_one_it_was_sent_for_is_cancelled(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        first, second = (pool.submit("query", [fifo.order, *documents(5)]) for _ in range(2))
        fifo.wait_until_read()
        assert first.cancel()
        until(lambda: pool.stats().cancelled == 1)
        third = pool.submit("query", [fifo.order, *documents(6)])
        fifo.release()
        assert second.result(PATIENCE) == ranked("query", [fifo.order, *documents(5)])
        assert third.result(PATIENCE) == ranked("query", [fifo.order, *documents(6)])
        stats = pool.stats()
    assert stats.scored_pairs == 7
    assert stats.pending_pairs == 0


@pytest.mark.parametrize("on_timeout", ["raise", "partial"])
def test_the_one_it_was_sent_for_expires(make_pool: MakePool, fifo: Fifo, on_timeout: str) -> None:
    with make_pool(workers=1) as pool:
        texts = [fifo.order, *documents(5)]
        first = pool.submit("query", texts, timeout=0.05, on_timeout=on_timeout)
        fifo.wait_until_read()
        second = pool.submit("query", texts)
        if on_timeout == "raise":
            with pytest.raises(RequestTimeoutError, match="0 of 6"):
                first.result(PATIENCE)
        else:
            assert {result.relevance_score for result in first.result(PATIENCE)} == {None}
        fifo.release()
        assert second.result(PATIENCE) == ranked("query", texts)
        assert pool.stats().scored_pairs == 6


def test_one_that_waits_for_another_s_pair_expires_by_itself(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool() as pool:
        first = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        second = pool.submit("query", [fifo.order, *documents(3)], timeout=0.5, on_timeout="partial")
        results = second.result(PATIENCE)
        assert results[:3] == [r for r in ranked("query", [fifo.order, *documents(3)]) if r.index]
        assert (results[3].index, results[3].relevance_score) == (0, None)
        assert pool.stats().pending_pairs == 1
        fifo.release()
        assert first.result(PATIENCE)


@pytest.mark.parametrize("cancelled", [False, True], ids=["and stays", "and is cancelled"])
def test_the_worker_it_was_sent_to_dies(make_pool: MakePool, fifo: Fifo, tmp_path: Path, cancelled: bool) -> None:
    with make_pool(workers=1) as pool:
        texts = [f"!once {tmp_path / 'stuck'} {fifo.order}", *documents(30)]
        first, second = (pool.submit("query", texts) for _ in range(2))
        fifo.wait_until_read()
        if cancelled:
            assert first.cancel()
        psutil.Process(fifo.pid).kill()
        assert second.result(PATIENCE) == ranked("query", texts)
        assert cancelled or first.result(PATIENCE) == ranked("query", texts)
        fifo.release()
        stats = pool.stats()
    assert stats.crashes == 1
    assert stats.scored_pairs == len(texts)


def test_a_poison_fails_all_who_hold_it_and_nobody_else(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        pool.submit("query", ["waits behind the gate"])
        poisoned = [pool.submit("query", [*documents(i), "!os._exit 3", *documents(9)[i:]]) for i in range(4)]
        innocent = [pool.submit("query", documents(i)) for i in range(1, 10)]  # they share the other documents with it
        fifo.release()
        for i, future in enumerate(poisoned):
            with pytest.raises(WorkerCrashedError) as caught:
                future.result(PATIENCE)
            assert (caught.value.document_index, caught.value.attempts) == (i, 3)
        assert [f.result(PATIENCE) for f in innocent] == [ranked("query", documents(i)) for i in range(1, 10)]
        stats = pool.stats()
    assert (stats.crashes, stats.failed) == (3, 4)
    assert (stats.pending_requests, stats.pending_pairs) == (0, 0)


def test_what_the_model_raises_on_a_document_is_raised_to_all_who_hold_it(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        pool.submit("query", ["waits behind the gate"])
        bad = [pool.submit("query", [*documents(i), "!raise no", *documents(9)[i:]]) for i in range(4)]
        good = [pool.submit("query", documents(i)) for i in range(1, 10)]
        fifo.release()
        errors = [future.exception(PATIENCE) for future in bad]
        assert [type(error) for error in errors] == [ScoringError] * 4
        assert [error.document_index for error in errors] == [0, 1, 2, 3]  # type: ignore[union-attr]
        assert [f.result(PATIENCE) for f in good] == [ranked("query", documents(i)) for i in range(1, 10)]
        assert pool.stats().pending_pairs == 0


def test_both_models_of_a_reload_score_for_their_own(make_pool: MakePool, fifo: Fifo) -> None:
    """The same pairs at once: what has begun with the old model, what waits, and what comes after."""
    with make_pool(workers=1, slice_tokens=30, score_cache=1000) as pool:
        texts = documents(20)
        begun = pool.submit_pairs([("query", fifo.order), *(("query", text) for text in texts)])
        fifo.wait_until_read()
        pool.submit("query", ["the slice that waits in the worker behind"])
        waiting = [pool.submit_pairs([("query", text) for text in texts]) for _ in range(2)]
        pool.reload(SALTED)
        after = [pool.submit_pairs([("query", text) for text in texts]) for _ in range(2)]
        for future in (*after, *waiting):
            assert future.result(PATIENCE).tolist() == salted("query", texts)
        assert not begun.done()
        fifo.release()
        assert begun.result(PATIENCE).tolist()[1:] == scores_of("query", texts)
        again = pool.submit_pairs([("query", text) for text in texts])
        assert again.result(PATIENCE).tolist() == salted("query", texts)


@pytest.mark.parametrize("isolation", ["process", "thread"])
def test_kept_scores_are_not_made_again(make_pool: MakePool, notes: list[str], isolation: str) -> None:
    with make_pool(isolation=isolation, score_cache=100) as pool:
        assert pool.rerank("query", notes) == ranked("query", notes)
        slices = pool.stats().slices
        for _ in range(3):
            assert pool.rerank("query", notes[::-1]) == ranked("query", notes[::-1])
        assert pool.stats().slices == slices
        assert pool.rerank("query", [*notes, "new"]) == ranked("query", [*notes, "new"])
        assert pool.rerank("other", ["new"]) == ranked("other", ["new"])
        stats = pool.stats()
    assert marks(notes) == {1}
    assert (stats.scored_pairs, stats.coalesced_pairs, stats.cached_pairs) == (12 + 2, 0, 4 * 12)
    assert (stats.completed, stats.pending_requests, stats.pending_pairs) == (6, 0, 0)


def test_kept_scores_are_few_and_the_latest(make_pool: MakePool) -> None:
    with make_pool(workers=1, score_cache=10) as pool:
        for texts in (documents(10), documents(5), [f"another {i}" for i in range(5)], documents(5)):
            assert pool.rerank("query", texts) == ranked("query", texts)
        assert pool.stats().cached_pairs == 10
        assert pool.rerank("query", documents(10)) == ranked("query", documents(10))
        assert pool.stats().cached_pairs == 15


def test_kept_scores_are_their_model_s(make_pool: MakePool) -> None:
    with make_pool(score_cache=100) as pool:
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))
        for spec, expected in ((SALTED, salted), (ModelSpec("fake", loader="fakes:load"), scores_of)):
            pool.reload(spec)
            for cached in (0, 9):
                before = pool.stats().cached_pairs
                scores = pool.submit_pairs([("query", text) for text in documents(9)]).result(PATIENCE)
                assert scores.tolist() == expected("query", documents(9))
                assert pool.stats().cached_pairs - before == cached


def test_kept_scores_outlive_the_worker_that_made_them(make_pool: MakePool) -> None:
    with make_pool(workers=1, score_cache=100) as pool:
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))
        pid = pool.workers()[0].pid
        psutil.Process(pid).kill()
        assert pool.rerank("query", documents(9)) == ranked("query", documents(9))
        assert pool.stats().cached_pairs == 9


def test_what_failed_is_not_kept(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool(workers=1, score_cache=100) as pool:
        order = f"!once {tmp_path / 'raised'} !raise this once"
        with pytest.raises(ScoringError, match="this once"):
            pool.rerank("query", [order])
        assert pool.rerank("query", [order]) == ranked("query", [order])


def test_several_scores_a_pair(make_pool: MakePool) -> None:
    with make_pool(THREE, score_cache=100) as pool:
        pairs = [(f"query {i % 3}", f"document {i % 5} {'x' * (i % 5)}") for i in range(60)]
        expected = np.array([[score_of(q, d), score_of(d, q), len(d)] for q, d in pairs], dtype=np.float32)
        for _ in range(2):
            scores = pool.submit_pairs(pairs).result(PATIENCE)
            assert scores.dtype == np.float32
            assert np.array_equal(scores, expected)
        stats = pool.stats()
    assert (stats.scored_pairs, stats.coalesced_pairs, stats.cached_pairs) == (15, 45, 60)


def test_any_text_is_its_own_key(make_pool: MakePool) -> None:
    """Kept under digests: of strings that look alike, of what is no Unicode text, of where the query ends."""
    odd = ["", " ", "\0", "\ud800", "\ud801", "é", "e\u0301", "long " * 100_000, "long " * 100_000 + "."]
    pairs = [(query, document) for query in [*odd[:7], "ab", "a"] for document in [*odd, "c", "bc"]]
    expected = [score_of(*pair) for pair in pairs]
    with make_pool(score_cache=1000) as pool:
        for _ in range(2):
            assert pool.submit_pairs(pairs).result(PATIENCE).tolist() == expected
        assert pool.stats().cached_pairs == len(pairs)


def test_what_is_shared_counts_against_the_bound_until_its_request_is_done(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, max_pending_pairs=10, overload="raise") as pool:
        first = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        more = [pool.submit("query", [fifo.order, *documents(2)]) for _ in range(3)]
        with pytest.raises(PoolOverloadedError):
            pool.submit("query", [fifo.order])
        assert more[0].cancel()
        until(lambda: pool.stats().pending_pairs == 7)
        more.append(pool.submit("query", [fifo.order, *documents(2)]))
        fifo.release()
        for future in more[1:]:
            assert future.result(PATIENCE) == ranked("query", [fifo.order, *documents(2)])
        assert first.result(PATIENCE)
        assert pool.stats().pending_pairs == 0


@pytest.mark.parametrize("drain", [True, False])
def test_closing_answers_all_who_wait_for_the_same(make_pool: MakePool, fifo: Fifo, drain: bool) -> None:
    pool = make_pool(workers=1)
    futures = [pool.submit("query", [fifo.order, *documents(3)]) for _ in range(5)]
    fifo.wait_until_read()
    if drain:
        fifo.release()
    pool.close(drain=drain)
    for future in futures:
        if drain:
            assert future.result(0) == ranked("query", [fifo.order, *documents(3)])
        else:
            assert isinstance(future.exception(0), PoolClosedError)
    if not drain:
        fifo.release()


def test_who_keeps_no_scores_imports_nothing_for_it() -> None:
    code = (
        "import sys; from mp_rerank import *; pool = RerankerPool(ModelSpec('f', loader='fakes:load'), devices='cpu', "
        "workers=1); pool.rerank('q', ['d', 'd']); pool.close(); print('cachetools' in sys.modules)"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tests,
        env={**os.environ, "PYTHONPATH": str(tests.parent)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
