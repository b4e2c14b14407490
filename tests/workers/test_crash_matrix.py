"""Loky's crash matrix: every way to fail, at every step of a job, and again from inside a done-callback.

The steps of a job here: the task is pickled in the parent, unpickled in the worker, run, its result pickled in the
worker and unpickled in the parent. Ours are built so that user code runs at two of them only: while scoring, and while
the scores are turned into numbers. Tasks are tuples of exact ``str``, results are bytes: neither runs anybody's code
when it is pickled or unpickled, and that is what the matrix shows of these steps.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest
from conftest import PATIENCE, ranked
from fakes import obey, score_of

from mp_rerank import ModelSpec, RerankerPool, ScoringError, WorkerCrashedError
from mp_rerank._workers.child import Scored

MakePool = Callable[..., RerankerPool]

ORDERS = {
    "raise": "!raise on purpose",
    "sys.exit": "!sys.exit",
    "os._exit": "!os._exit 5",
    "SIGSEGV": "!segfault",
}
STEPS = ["task pickle", "task unpickle", "run", "result pickle", "result unpickle"]


class Evil(str):
    """A document that obeys an order whenever it is pickled, and another when it is unpickled."""

    __slots__ = ("order",)

    def __new__(cls, text: str, order: str) -> Evil:
        evil = super().__new__(cls, text)
        evil.order = order
        return evil

    def __reduce__(self) -> tuple[Any, ...]:
        return obey, (self.order,)


class EvilToPickle(Evil):
    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        obey(self.order)
        return super().__reduce__()


def document_for(step: str, order: str) -> str:
    if step == "task pickle":
        return EvilToPickle("text", order)
    if step in ("task unpickle", "result unpickle"):
        return Evil("text", order)
    return order if step == "run" else f"!in-result {order}"


def check(pool: RerankerPool, step: str, how: str, future: Future[Any], document: str) -> None:
    if step not in ("run", "result pickle"):
        # The caller's own object comes back, and nobody pickled it on the way.
        [result] = future.result(PATIENCE)
        assert result.document is document
        assert result.relevance_score == score_of("query", str.__str__(document))
        return
    error = future.exception(PATIENCE)
    if how in ("raise", "sys.exit"):
        assert isinstance(error, ScoringError)
        assert ("on purpose" if how == "raise" else "SystemExit: 7") in str(error)
    else:
        assert isinstance(error, WorkerCrashedError)
        assert error.exit_code == (5 if how == "os._exit" else -11)
        assert error.attempts == 2
    assert error.document_index == 0


@pytest.fixture
def pool(make_pool: MakePool) -> Iterator[RerankerPool]:
    with make_pool(max_attempts=2, max_restarts=100) as pool:
        yield pool


@pytest.mark.parametrize("from_callback", [False, True], ids=["", "from a callback"])
@pytest.mark.parametrize("step", STEPS)
def test_matrix(pool: RerankerPool, step: str, from_callback: bool) -> None:
    """One pool goes through all four."""
    for how, order in ORDERS.items():
        document = document_for(step, order)
        if from_callback:
            inner: Future[Future[Any]] = Future()
            outer = pool.submit("query", ["document"] * 50)
            outer.add_done_callback(partial(submit_in_callback, pool, document, inner))
            future = inner.result(PATIENCE)
        else:
            future = pool.submit("query", [document])
        others = [pool.submit(f"query {i}", [f"document {i}"]) for i in range(5)]
        check(pool, step, how, future, document)
        assert [f.result(PATIENCE) for f in others] == [ranked(f"query {i}", [f"document {i}"]) for i in range(5)]


@pytest.mark.parametrize("step", ["run", "result pickle"])
def test_a_callback_of_the_crashed_request_may_crash_the_next(pool: RerankerPool, step: str) -> None:
    for how, order in ORDERS.items():
        document = document_for(step, order)
        inner: Future[Future[Any]] = Future()
        first = pool.submit("query", [document])
        first.add_done_callback(partial(submit_in_callback, pool, document, inner))
        check(pool, step, how, first, document)
        check(pool, step, how, inner.result(PATIENCE), document)
        assert pool.rerank("query", ["document"]) == ranked("query", ["document"])


def submit_in_callback(pool: RerankerPool, document: str, inner: Future[Future[Any]], _: Future[Any]) -> None:
    inner.set_result(pool.submit("query", [document]))


@pytest.mark.parametrize("how", ORDERS)
def test_a_model_s_settings_that_fail_as_they_are_unpickled(make_pool: MakePool, how: str) -> None:
    """The one thing of the caller's that a worker unpickles; an exception is an error of loading, by name."""
    evil = Evil("text", ORDERS[how])
    spec = ModelSpec("fake", loader="fakes:load", model_kwargs={"evil": evil})
    pool = make_pool(spec, max_restarts=1)
    with pytest.raises(Exception, match=r"could not be loaded|in a row") as caught:
        pool.start()
    expected = {"raise": "ValueError: on purpose", "sys.exit": "SystemExit: 7", "os._exit": "code 5"}
    assert expected.get(how, "SIGSEGV") in str(caught.value)


def test_settings_that_cannot_be_pickled_are_refused_where_they_are_given() -> None:
    with pytest.raises(ValueError, match="model_kwargs: it cannot be sent to a worker process: on purpose"):
        ModelSpec("fake", model_kwargs={"evil": EvilToPickle("text", "!raise on purpose")})


def test_what_travels_runs_nobody_s_code() -> None:
    """A task's pickle calls nothing at all, a result's nothing but its own class."""

    def called(data: bytes) -> set[str]:
        return {opcode.name for opcode, _, _ in pickletools.genops(data)} & {"REDUCE", "NEWOBJ", "NEWOBJ_EX", "GLOBAL"}

    task = pickle.dumps([("query", "document")])
    result = pickle.dumps(Scored(b"\0\0\0\0", None, 0.1))
    assert called(task) == set()
    assert called(result) == {"NEWOBJ"}
    assert b"numpy" not in result
