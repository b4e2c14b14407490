"""``connect``: what a client does beside what the contract suite shows, where ``http`` is one of the kinds."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked, until
from fakes import score_of
from serving import Running, serving

from mp_rerank import (
    ModelLoadError,
    ModelSpec,
    PoolClosedError,
    PoolOverloadedError,
    RequestTimeoutError,
    RerankError,
    ScoringError,
    WorkerCrashedError,
    connect,
)
from mp_rerank.server.keys import Keys
from mp_rerank.server.limits import Limits

MODELS = {"fake": FAKE, "other": ModelSpec("salted", loader="fakes:load_salted")}
TEXTS = [f"document {i}" for i in range(10)]


@pytest.fixture
def server() -> Iterator[Running]:
    with serving({"fake": FAKE}, {"workers": 1}) as running:
        yield running


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_a_model_by_its_name_and_an_unknown_one() -> None:
    with serving(MODELS, {"workers": 1}) as server:
        with connect(server.url, model="other") as pool:
            assert pool.predict([("query", "document")]).tolist() == [score_of("salted query", "document")]
        with pytest.raises(ModelLoadError, match="'another' is not served here"):
            connect(server.url, model="another").start()


def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serving({"fake": FAKE}, uds=str(path)), connect(f"unix:{path}") as pool:
        assert pool.rerank("query", TEXTS) == ranked("query", TEXTS)


def test_a_key_and_the_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"fake": FAKE}, keys=Keys(["alice one"])) as server:
        with connect(server.url, api_key="one", caller="somebody") as pool:
            pool.rerank("query", TEXTS)
            assert list(pool.stats().callers) == ["key:alice"]
        with pytest.raises(RerankError, match="an API key is needed"):
            connect(server.url, api_key="two").start()
        monkeypatch.setenv("MP_RERANK_API_KEY", "one")
        with connect(server.url) as pool:
            assert "one" not in repr(pool)


def test_logits_or_a_sigmoid_whatever_the_models_own() -> None:
    with serving({"fake": FAKE}) as server:
        logit = score_of("query", "document")
        scores = {}
        for activation in (None, "identity", "sigmoid"):
            with connect(server.url, activation=activation) as pool:  # type: ignore[arg-type]
                scores[activation] = pool.predict([("query", "document")]).item()
        assert scores[None] == scores["identity"] == logit
        assert scores["sigmoid"] == pytest.approx(1 / (1 + 2.718281828459045**-logit), abs=1e-6)


def test_documents_stay_here(server: Running) -> None:
    records = [{"text": text, "object": object()} for text in TEXTS]
    with connect(server.url) as pool:
        best = pool.rerank("query", records, top_n=1)[0]
        assert best.record is records[best.index]


def test_large_requests_go_in_parts_that_a_server_accepts(server: Running) -> None:
    documents = [f"document {i}" for i in range(2500)]
    with connect(server.url) as pool:
        assert pool.rerank("query", documents) == ranked("query", documents)
        assert pool.stats().submitted == 3
        with pytest.raises(ScoringError, match="document 1200 ") as caught:
            pool.rerank("query", [*documents[:1200], "!raise odd"])
        assert caught.value.document_index == 1200


def test_streams_give_scores_part_by_part(server: Running, fifo: Fifo) -> None:
    documents = [f"document {i}" for i in range(100)]
    with connect(server.url) as pool:
        assert dict(pool.stream("query", documents)) == {i: score_of("query", d) for i, d in enumerate(documents)}

        async def gather() -> dict[int, object]:
            return {index: score async for index, score in pool.astream("query", documents)}

        assert asyncio.run(gather()) == dict(pool.stream("query", documents))
        with pytest.raises(ScoringError), pool.stream("query", [*documents, "!raise odd"]) as stream:
            list(stream)
        with pool.stream("query", [fifo.order, *documents]):
            fifo.wait_until_read()
        until(lambda: pool.stats().pending_pairs == 0)
        fifo.release()


def test_callers(server: Running) -> None:
    with connect(server.url, caller="naïve 文") as pool:
        pool.rerank("query", TEXTS)
        pool.for_caller("b").rerank("query", TEXTS)
        pool.rerank("query", TEXTS, caller="c")
        handle = pool.for_caller("d")
        handle.close()
        with pytest.raises(PoolClosedError):
            handle.rerank("query", TEXTS)
        callers = pool.stats().callers
        assert set(callers) == {"header:na%C3%AFve %E6%96%87", "header:b", "header:c"}
        assert {caller.completed for caller in callers.values()} == {1}


def test_cancelling_cancels_on_the_server(server: Running, fifo: Fifo) -> None:
    with connect(server.url) as pool:
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        waiting = pool.submit("query", TEXTS)
        until(lambda: pool.stats().pending_requests == 2)
        assert waiting.cancel()
        assert waiting.cancelled()
        until(lambda: pool.stats().cancelled == 1)
        assert pool.stats().pending_pairs == 1
        fifo.release()
        assert held.result(PATIENCE)[0].document == fifo.order
        with pytest.raises(CancelledError):
            waiting.result()


def test_a_cancelled_task_cancels_on_the_server(server: Running, fifo: Fifo) -> None:
    with connect(server.url) as pool:

        async def agent() -> None:
            task = asyncio.ensure_future(pool.arerank("query", [fifo.order, *TEXTS]))
            await asyncio.to_thread(fifo.wait_until_read)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(agent())
        until(lambda: pool.stats().cancelled == 1)
        fifo.release()


def test_deadlines(server: Running, fifo: Fifo) -> None:
    opened = threading.Thread(target=fifo.wait_until_read)
    opened.start()
    with connect(server.url) as pool:
        with pytest.raises(RequestTimeoutError) as caught:
            pool.rerank("query", [fifo.order, *TEXTS], timeout=0.3)
        assert (caught.value.timeout, caught.value.total) == (0.3, 11)
        partial = pool.rerank("query", TEXTS, timeout=0.1, on_timeout="partial")
        assert [result.relevance_score for result in partial] == [None] * 10
        opened.join()
        fifo.release()
        assert pool.rerank("query", TEXTS, timeout=PATIENCE) == ranked("query", TEXTS)


def test_a_server_that_does_not_answer_keeps_nobody_past_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pool = connect(f"http://127.0.0.1:{silent.getsockname()[1]}")
        link = pool._link()
        link.num_labels = 1  # as if it had answered before
        with pytest.raises(RequestTimeoutError, match="no answer"):
            pool.rerank("query", TEXTS, timeout=0.1)
        pool.close(drain=False)


def test_errors_are_the_pools_own(server: Running) -> None:
    with connect(server.url) as pool:
        with pytest.raises(WorkerCrashedError) as caught:
            pool.rerank("query", ["fine", "!os._exit 3"])
        assert (caught.value.exit_code, caught.value.document_index, caught.value.attempts) == (3, 1, 3)
        for bad, error in (({"documents": "text"}, TypeError), ({"documents": [], "timeout": -1}, ValueError)):
            with pytest.raises(error):
                pool.submit("query", **bad)  # type: ignore[arg-type]


def test_at_the_servers_bound_it_waits_or_raises(fifo: Fifo) -> None:
    limits = Limits(requests_per_caller=1)
    with (
        serving({"fake": FAKE}, {"workers": 1}, limits=limits) as server,
        ThreadPoolExecutor(1) as threads,
        connect(server.url, caller="a") as pool,
        connect(server.url, caller="a", overload="raise") as hasty,
    ):
        held = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        with pytest.raises(PoolOverloadedError, match="this caller has 1 requests"):
            hasty.rerank("query", TEXTS)
        patient = threads.submit(pool.rerank, "query", TEXTS)
        with pytest.raises(RequestTimeoutError):
            pool.rerank("query", TEXTS, timeout=0.2)
        assert not patient.done()
        fifo.release()
        assert patient.result(PATIENCE) == ranked("query", TEXTS)
        held.result(PATIENCE)


def test_a_server_that_comes_back_is_asked_again() -> None:
    port = free_port()
    pool = connect(f"http://127.0.0.1:{port}", retry_for=PATIENCE)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(pool.rerank, "query", TEXTS)
        with serving({"fake": FAKE}, {"workers": 1}, at=port):
            assert first.result(PATIENCE) == ranked("query", TEXTS)
        again = threads.submit(pool.rerank, "query", TEXTS)
        time.sleep(0.1)  # into the pause
        with serving({"fake": FAKE}, {"workers": 1}, at=port):
            assert again.result(PATIENCE) == ranked("query", TEXTS)
    pool.close()


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(RerankError, match="cannot be reached: ConnectError"):
        connect(f"http://127.0.0.1:{free_port()}", retry_for=0).start()


def test_it_waits_for_a_server_that_loads() -> None:
    with (
        serving({"fake": FAKE}, load=False) as server,
        ThreadPoolExecutor(1) as threads,
        closing(connect(server.url)) as pool,
    ):
        started = threads.submit(pool.rerank, "query", TEXTS)
        server.models.load()
        assert started.result(PATIENCE) == ranked("query", TEXTS)


def test_closing(server: Running, fifo: Fifo) -> None:
    pool = connect(server.url)
    assert "not started" in repr(pool)
    pool.start()
    done = [pool.submit("query", TEXTS) for _ in range(5)]
    pool.close()
    assert all(future.done() for future in done)
    assert [future.result()[0] for future in done] == [ranked("query", TEXTS)[0]] * 5
    for call in (pool.start, pool.stats, lambda: pool.submit("query", []), lambda: pool.predict([])):
        with pytest.raises(PoolClosedError, match="closed"):
            call()
    pool.close()
    hasty = connect(server.url)
    held = hasty.submit("query", [fifo.order])
    fifo.wait_until_read()
    hasty.close(drain=False)
    with pytest.raises(PoolClosedError):
        held.result()
    until(lambda: server.pool.stats().pending_pairs == 0)
    fifo.release()


def test_a_lost_client_leaves_no_thread(server: Running) -> None:
    pool = connect(server.url)
    pool.rerank("query", TEXTS)
    del pool
    gc.collect()
    until(lambda: not any(thread.name == "mp_rerank-client" for thread in threading.enumerate()))


def test_pickled_and_copied(server: Running) -> None:
    with connect(server.url, caller="a") as pool:
        assert copy.copy(pool) is copy.deepcopy(pool) is pool
        with pickle.loads(pickle.dumps(pool)) as other:
            assert other is not pool
            assert other.rerank("query", TEXTS) == ranked("query", TEXTS)
        assert list(pool.stats().callers) == ["header:a"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_fork_has_connections_of_its_own(server: Running) -> None:
    with connect(server.url) as pool:
        expected = pool.rerank("query", TEXTS)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = int(pool.rerank("query", TEXTS) != expected)
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
        assert pool.rerank("query", TEXTS) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"url": "127.0.0.1:8080"}, ValueError, "url: 'http://"),
        ({"url": 7}, TypeError, "url: a string"),
        ({"url": "http://a", "overload": "never"}, ValueError, "overload: 'block'"),
        ({"url": "http://a", "activation": "tanh"}, ValueError, "activation: 'sigmoid'"),
        ({"url": "http://a", "retry_for": -1}, ValueError, "retry_for: at least 0"),
        ({"url": "http://a", "caller": ""}, ValueError, "caller: a string that is not empty"),
    ],
)
def test_a_mistake_is_named(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        connect(**arguments)  # type: ignore[arg-type]
