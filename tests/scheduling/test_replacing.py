"""Workers replaced for their age or their memory, and models replaced under the callers' feet: nobody notices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked, until
from fakes import score_of

from mp_rerank import ModelLoadError, ModelSpec, PoolClosedError, RerankerPool, RerankError, WorkerCrashedError

MakePool = Callable[..., RerankerPool]

SALTED = ModelSpec("salted", loader="fakes:load_salted")


def documents(count: int) -> list[str]:
    return [f"document {i}" for i in range(count)]


def salted(query: str, texts: list[str]) -> list[float]:
    return [score_of("salted " + query, text) for text in texts]


def test_workers_are_recycled_one_at_a_time_and_nobody_notices(make_pool: MakePool) -> None:
    with make_pool(workers=3, max_slices_per_worker=4, slice_tokens=40) as pool:
        states: list[tuple[str, ...]] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.is_set():
                states.append(tuple(info.state for info in pool.workers()))

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            while pool.stats().recycled < 4:
                assert pool.rerank("query", documents(20)) == ranked("query", documents(20))
        finally:
            stop.set()
            watching.join()
        stats = pool.stats()
        assert (stats.crashes, stats.failed) == (0, 0)
        assert max(sum(state != "ready" for state in each) for each in states) == 1
        assert sum(info.generation - 1 for info in pool.workers()) == stats.restarts == stats.recycled


def test_a_worker_grown_too_large_is_replaced(make_pool: MakePool) -> None:
    with make_pool(workers=2) as pool:
        assert all(memory.rss > 2**20 for memory in pool.memory().workers)
    with make_pool(workers=2, max_memory_per_worker=2**20) as pool:
        pids = {info.pid for info in pool.workers()}
        assert pool.rerank("query", documents(50)) == ranked("query", documents(50))
        until(lambda: pool.stats().recycled >= 1)
        assert pool.rerank("query", documents(50)) == ranked("query", documents(50))
        until(lambda: {info.state for info in pool.workers()} == {"ready"})
        assert pids - {info.pid for info in pool.workers()}
    with make_pool(workers=1, max_memory_per_worker=2**40) as pool:
        assert pool.rerank("query", documents(50))
        assert pool.stats().recycled == 0


def test_a_worker_that_dies_while_it_drains(make_pool: MakePool, fifo: Fifo, tmp_path: Path) -> None:
    with make_pool(workers=1, max_slices_per_worker=1, slice_tokens=10) as pool:
        first = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        mortal = f"!once {tmp_path / 'died'} !signal SIGKILL"
        second = pool.submit("query", [mortal])  # waits in the worker behind the first: that is what it drains
        pool.stats()  # answered in turn: it has been sent
        fifo.release()
        assert first.result(PATIENCE)
        assert second.result(PATIENCE) == ranked("query", [mortal])
        until(lambda: pool.stats().recycled == 1)  # the successor, after its first slice
        assert pool.stats().crashes == 1


def test_a_reload_makes_nobody_wait_for_a_load(make_pool: MakePool, fifo: Fifo) -> None:
    """While the new model stands at its gate, the old one serves; then all at once the new."""
    with make_pool(workers=1) as pool:
        reloading = threading.Thread(target=pool.reload, args=(ModelSpec(fifo.order, loader="fakes:load_after_gate"),))
        reloading.start()
        fifo.wait_until_read()
        for i in range(20):
            assert pool.rerank(f"query {i}", documents(20), timeout=PATIENCE) == ranked(f"query {i}", documents(20))
        fifo.release()
        reloading.join(PATIENCE)
        assert pool.submit_pairs([("query", "document")]).result(PATIENCE).tolist() == salted("query", ["document"])
        assert (pool.stats().reloads, pool.stats().failed) == (1, 0)
        assert "FAKE" not in repr(pool)
        assert pool.spec.loader == "fakes:load_after_gate"


def test_no_request_is_scored_half_by_each(make_pool: MakePool) -> None:
    with make_pool(slice_tokens=100) as pool:
        stop = threading.Event()
        mixed: list[str] = []
        served = {"old": 0, "new": 0}

        def agent(name: str) -> None:
            turn = 0
            while not stop.is_set():
                turn += 1
                query, texts = f"{name} {turn}", documents(60)
                scores = pool.submit_pairs([(query, text) for text in texts]).result(PATIENCE).tolist()
                if scores == [score_of(query, text) for text in texts]:
                    served["old"] += 1
                elif scores == salted(query, texts):
                    served["new"] += 1
                else:
                    mixed.append(query)

        agents = [threading.Thread(target=agent, args=(f"agent {n}",)) for n in range(6)]
        for thread in agents:
            thread.start()
        try:
            for turn in range(6):
                pool.reload(SALTED if turn % 2 == 0 else FAKE)
        finally:
            stop.set()
            for thread in agents:
                thread.join(PATIENCE)
        assert mixed == []
        assert min(served.values()) > 0
        assert pool.stats().failed == 0
        assert pool.stats().reloads == 6


def test_what_has_begun_ends_with_the_old_model_and_what_waits_gets_the_new(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=30) as pool:
        begun = pool.submit_pairs([("query", fifo.order), *(("query", text) for text in documents(20))])
        fifo.wait_until_read()
        pool.submit("query", ["the slice that waits in the worker behind"])
        waiting = pool.submit_pairs([("waiting", text) for text in documents(20)])
        pool.reload(SALTED)
        after = pool.submit_pairs([("after", text) for text in documents(20)])
        assert after.result(PATIENCE).tolist() == salted("after", documents(20))
        assert waiting.result(PATIENCE).tolist() == salted("waiting", documents(20))
        assert not begun.done()
        old = fifo.pid
        fifo.release()
        assert begun.result(PATIENCE).tolist()[1:] == [score_of("query", text) for text in documents(20)]
        until(lambda: not psutil.pid_exists(old))


def test_what_waits_for_one_score_a_pair_is_not_given_three(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1, slice_tokens=10) as pool:
        begun = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        waiting = [pool.submit("query", documents(20)) for _ in range(5)]
        pool.reload(ModelSpec("three", loader="fakes:load_three_labels"))
        fifo.release()
        assert begun.result(PATIENCE)
        assert [future.result(PATIENCE) for future in waiting] == [ranked("query", documents(20))] * 5
        assert pool.predict([("query", "document")]).shape == (1, 3)


def test_a_ranking_that_comes_as_the_model_gets_three_labels_is_refused_in_words(
    make_pool: MakePool, fifo: Fifo
) -> None:
    """Checked as it was submitted, admitted after the reload."""
    with make_pool(workers=1, max_pending_pairs=1) as pool:
        begun = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        in_line: list[Any] = []
        waiting = threading.Thread(target=lambda: in_line.append(pool.submit("query", documents(2))))
        waiting.start()
        until(lambda: "1 requests in line" in repr(pool))
        pool.reload(ModelSpec("three", loader="fakes:load_three_labels"))
        fifo.release()
        waiting.join(PATIENCE)
        error = in_line[0].exception(PATIENCE)
        assert isinstance(error, ValueError)
        assert "gives 3 scores a pair, and ranking needs one" in str(error)
        assert begun.result(PATIENCE)
        assert pool.submit_pairs([("query", "document")]).result(PATIENCE).shape == (1, 3)
        assert pool.stats().pending_pairs == 0


def test_a_model_that_cannot_be_loaded_leaves_the_old_one(make_pool: MakePool) -> None:
    with make_pool(max_restarts=1) as pool:
        with pytest.raises(ModelLoadError, match="not this one"):
            pool.reload(ModelSpec("!raise not this one", loader="fakes:load_obeying"))
        with pytest.raises(WorkerCrashedError, match="in a row"):
            pool.reload(ModelSpec("!os._exit 1", loader="fakes:load_obeying"))
        with pytest.raises(ValueError, match="cannot be imported"):
            pool.reload(ModelSpec("none", loader="no_such_module:load"))
        assert pool.spec == FAKE
        assert pool.rerank("query", documents(20)) == ranked("query", documents(20))
        assert pool.stats().reloads == 0


def test_one_reload_at_a_time(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        first = threading.Thread(target=pool.reload, args=(ModelSpec(fifo.order, loader="fakes:load_after_gate"),))
        first.start()
        fifo.wait_until_read()
        with pytest.raises(RerankError, match="already under way"):
            pool.reload(SALTED)
        fifo.release()
        first.join(PATIENCE)


def test_a_reload_whose_worker_dies_while_loading(make_pool: MakePool, tmp_path: Path) -> None:
    with make_pool() as pool:
        pool.reload(ModelSpec(f"!once {tmp_path / 'died'} !signal SIGKILL", loader="fakes:load_after_gate"))
        scores = pool.submit_pairs([("query", "document")]).result(PATIENCE)
        assert scores.tolist() == salted("query", ["document"])


def test_an_old_worker_that_dies_still_ends_what_it_had_begun(make_pool: MakePool, fifo: Fifo, tmp_path: Path) -> None:
    with make_pool(workers=1) as pool:
        document = f"!once {tmp_path / 'begun'} {fifo.order}"
        begun = pool.submit_pairs([("query", document)])
        fifo.wait_until_read()
        pool.reload(SALTED)
        psutil.Process(fifo.pid).kill()
        assert begun.result(PATIENCE).tolist() == [score_of("query", document)]
        fifo.release()


def test_closing_during_a_reload(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1).start()
    errors: list[BaseException] = []

    def reload() -> None:
        try:
            pool.reload(ModelSpec(fifo.order, loader="fakes:load_after_gate"))
        except RerankError as error:
            errors.append(error)

    reloading = threading.Thread(target=reload)
    reloading.start()
    fifo.wait_until_read()
    pool.close()
    reloading.join(PATIENCE)
    assert [type(error) for error in errors] == [PoolClosedError]
    assert not psutil.pid_exists(fifo.pid)
    fifo.release()
