"""Queries, documents, models and numbers as people have them, and what is refused where the caller is."""

from __future__ import annotations

import pickle
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from conftest import FAKE, PATIENCE, Fifo, ranked
from fakes import score_of, scores_of

from mp_rerank import ModelSpec, PoolConfig, RerankerPool, RerankResult
from mp_rerank._checks import memory_size

MakePool = Callable[..., RerankerPool]

DOCUMENTS = ["a", "b", "c"]


@pytest.fixture
def pool(make_pool: MakePool) -> RerankerPool:
    return make_pool(isolation="thread")


class OldSequence:
    """Is gone through by its numbers, as everything once was."""

    def __getitem__(self, place: int) -> str:
        return DOCUMENTS[place]


@pytest.mark.parametrize(
    "documents",
    [
        tuple(DOCUMENTS),
        (document for document in DOCUMENTS),
        iter(DOCUMENTS),
        map(str, DOCUMENTS),
        dict.fromkeys(DOCUMENTS).keys(),
        dict(enumerate(DOCUMENTS)).values(),
        np.array(DOCUMENTS),
        np.array(DOCUMENTS, dtype=object),
        list(np.array(DOCUMENTS)),
        OldSequence(),
    ],
    ids=lambda documents: type(documents).__name__,
)
def test_documents_come_from_any_iterable_in_an_order(pool: RerankerPool, documents: Any) -> None:
    results = pool.rerank(np.str_("query"), documents, top_n=np.int64(2), priority=np.int8(3))
    assert results == ranked("query", DOCUMENTS)[:2]
    assert {type(result.document) for result in results} == {str}


def test_documents_of_a_series_are_numbered_by_their_places(pool: RerankerPool) -> None:
    pandas = pytest.importorskip("pandas")
    series = pandas.Series(DOCUMENTS, index=[30, 20, 10])
    assert pool.rerank("query", series) == ranked("query", DOCUMENTS)
    assert pool.predict(pandas.Series([("query", "a"), ("query", "b")])).tolist() == scores_of("query", ["a", "b"])
    with pytest.raises(TypeError, match=r"documents\[1\]: a string is needed, not float nan"):
        pool.rerank("query", pandas.Series(["a", float("nan")], dtype=object))
    for frame in (pandas.DataFrame({"text": DOCUMENTS}), pandas.DataFrame()):
        with pytest.raises(TypeError, match=r"documents: a sequence of strings is needed, .*one column, or rows"):
            pool.rerank("query", frame)
        with pytest.raises(TypeError, match=r"pairs: a sequence of .*one column, or rows as tuples"):
            pool.submit_pairs(frame)
    rows = pandas.DataFrame({"query": ["query"], "text": ["a"]}).itertuples(index=False)
    assert pool.submit_pairs(rows).result(PATIENCE).tolist() == scores_of("query", ["a"])


def test_dicts_are_scored_by_their_text_and_handed_back(pool: RerankerPool) -> None:
    documents = [{"text": "a", "id": 7}, "b", UserDict(text=np.str_("c")), MappingProxyType({"text": "d"})]
    results = pool.rerank("query", documents)
    assert [(r.index, r.relevance_score, r.document) for r in results] == [
        (r.index, r.relevance_score, r.document) for r in ranked("query", ["a", "b", "c", "d"])
    ]
    for result in results:
        assert type(result.document) is str
        assert result.record is (None if result.document == "b" else documents[result.index])
    best = documents[results[0].index]
    assert pool.rank("query", documents, top_k=1, return_documents=True)[0]["text"] is best
    assert pool.rerank("query", DOCUMENTS)[0].record is None


def test_a_partial_ranking_hands_dicts_back_too(make_pool: MakePool, fifo: Fifo) -> None:
    with make_pool(workers=1) as pool:
        blocking = pool.submit("query", [fifo.order])
        fifo.wait_until_read()
        documents = [{"text": "late", "id": 1}]
        [result] = pool.rerank("query", documents, timeout=np.float32(0.05), on_timeout="partial")
        assert result == RerankResult(0, None, "late", documents[0])
        fifo.release()
        blocking.result(PATIENCE)


def test_a_result_is_a_small_value() -> None:
    plain, full = RerankResult(1, 0.5, "d"), RerankResult(1, 0.5, "d", {"text": "d"})
    assert RerankResult(index=1, relevance_score=0.5, document="d", record=None) == plain != full
    assert len({plain, full}) == 2, "a dict has no hash, a result with one has"
    assert not hasattr(plain, "__dict__")
    for result in (plain, full):
        assert pickle.loads(pickle.dumps(result)) == result
    with pytest.raises(AttributeError):
        plain.record = {}  # type: ignore[misc]


class NotATable:
    """Its columns are its own: they are not its class's."""

    def __init__(self) -> None:
        self.columns = 2

    def __iter__(self) -> Iterator[str]:
        return iter(DOCUMENTS)


def test_an_attribute_of_an_iterable_makes_no_table_of_it(pool: RerankerPool) -> None:
    assert pool.rerank("query", NotATable()) == ranked("query", DOCUMENTS)


def test_an_error_of_the_callers_own_iterator_is_his(pool: RerankerPool) -> None:
    def broken() -> Iterator[str]:
        yield "a"
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        pool.rerank("query", broken())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.submit("q", {"a": 1}), TypeError, "documents: a sequence of strings is needed, not dict {'a': 1}"),
        (lambda p: p.submit("q", {"a": 1}), TypeError, "by its keys; pass its values()"),
        (lambda p: p.submit("q", {"a"}), TypeError, "documents: a sequence of strings is needed, not set {'a'}"),
        (lambda p: p.submit("q", frozenset()), TypeError, "a set has no order"),
        (lambda p: p.submit("q", b"text"), TypeError, "not bytes b'text': decode it first"),
        (
            lambda p: p.submit("q", bytearray(b"t")),
            TypeError,
            "documents: a sequence of strings is needed, not bytearr",
        ),
        (lambda p: p.submit("q", [b"text"]), TypeError, "documents[0]: a string is needed, not bytes b'text'"),
        (lambda p: p.submit("q", np.array([b"a"])), TypeError, "documents[0]: a string is needed, not bytes b'a'"),
        (lambda p: p.submit(b"q", ["d"]), TypeError, "query: a string is needed, not bytes b'q'"),
        (lambda p: p.submit("q", np.array("a")), TypeError, "documents: a sequence of strings is needed, not ndarray"),
        (lambda p: p.submit("q", np.array([["a"]])), TypeError, "documents[0]: a string is needed, not list ['a']"),
        (lambda p: p.submit("q", [None]), TypeError, "documents[0]: a string is needed, not NoneType None"),
        (lambda p: p.submit("q", None), TypeError, "documents: a sequence of strings is needed, not NoneType None"),
        (
            lambda p: p.submit("q", ["a", {"title": "b", "body": "c"}]),
            TypeError,
            "documents[1]: a dict needs its text under 'text'; its keys are 'title', 'body'",
        ),
        (lambda p: p.submit("q", [{}]), TypeError, "documents[0]: a dict needs its text under 'text'; its keys are no"),
        (
            lambda p: p.submit("q", ["a", "b", {"text": 7}]),
            TypeError,
            "documents[2]['text']: a string is needed, not int 7",
        ),
        (lambda p: p.submit("q", [{"text": b"x"}]), TypeError, "documents[0]['text']: a string is needed, not bytes"),
        (lambda p: p.submit_pairs({"q": "d"}), TypeError, "pairs: a sequence of (query, document) is needed, not dict"),
        (
            lambda p: p.submit_pairs({("q", "d")}),
            TypeError,
            "pairs: a sequence of (query, document) is needed, not set",
        ),
        (lambda p: p.submit_pairs([b"qd"]), TypeError, "pairs[0]: a (query, document) is needed, not bytes"),
        (
            lambda p: p.submit_pairs([("q", "d"), ("q", b"d")]),
            TypeError,
            "pairs[1]: a string is needed, not bytes b'd'",
        ),
        (lambda p: p.predict({"q": "d"}), TypeError, "inputs: pairs of (query, document) are needed, not dict"),
        (lambda p: p.predict(), TypeError, "inputs: pairs of (query, document) are needed, not NoneType None"),
        (lambda p: p.submit("q", ["d"], top_n=True), TypeError, "top_n: a whole number or None is needed, not True"),
        (lambda p: p.submit("q", ["d"], top_n=np.bool_(True)), TypeError, "top_n: a whole number or None is needed"),
        (lambda p: p.submit("q", ["d"], top_n=np.float64(1)), TypeError, "top_n: a whole number or None is needed"),
        (lambda p: p.submit("q", ["d"], top_n="3"), TypeError, "top_n: a whole number or None is needed, not '3'"),
        (lambda p: p.submit("q", ["d"], top_n=np.int64(-1)), ValueError, "top_n: at least 0 is needed, not -1"),
        (lambda p: p.submit("q", ["d"], priority=np.int64(9)), ValueError, "priority: from -8 to 8 is needed, not 9"),
        (lambda p: p.submit("q", ["d"], priority=False), TypeError, "priority: a whole number is needed, not False"),
        (lambda p: p.submit("q", ["d"], timeout=np.bool_(True)), TypeError, "timeout: seconds or None are needed"),
    ],
)
def test_what_is_refused_is_named_before_the_pool_is_started(
    make_pool: MakePool, call: Callable[[RerankerPool], object], error: type[Exception], words: str
) -> None:
    pool = make_pool()
    with pytest.raises(error) as caught:
        call(pool)
    assert words in str(caught.value)
    assert pool.workers() == []


def test_predict_takes_pairs_as_crossencoder_does(pool: RerankerPool) -> None:
    both = scores_of("query", ["a", "b"])
    pairs = [("query", "a"), ("query", "b")]
    for given in (pairs, iter(pairs), np.array(pairs), np.array(pairs, dtype=object), [list(pair) for pair in pairs]):
        assert pool.predict(given).tolist() == both
        assert pool.predict(sentences=pairs).tolist() == both
    for one in (("query", "a"), ["query", "a"], np.array(["query", "a"])):
        assert pool.predict(one) == np.float32(score_of("query", "a"))
    assert pool.predict(np.array([])).shape == (0,)


def test_whole_numbers_of_any_type_are_python_s_own_from_then_on() -> None:
    counts = ("workers", "threads_per_worker", "batch_tokens", "slice_tokens", "max_slices_per_worker")
    counts += ("max_memory_per_worker", "max_pending_pairs", "max_pending_tokens", "max_attempts")
    counts += ("max_restarts", "score_cache")
    given = {name: np.int32(3) for name in counts}
    given |= {name: np.float32(0.5) for name in ("overload", "start_timeout", "hang_timeout", "restart_backoff")}
    config = PoolConfig.of(given)
    assert config == PoolConfig.of({name: value.item() for name, value in given.items()})
    assert {type(getattr(config, name)) for name in given} == {int, float}
    assert type(ModelSpec(max_length=np.int64(128)).max_length) is int
    for odd in (np.bool_(True), True, np.float64(2), "2"):
        with pytest.raises(TypeError, match="workers: a whole number is needed"):
            PoolConfig(workers=odd)


def test_names_of_models_and_devices_may_be_numpy_s_or_paths(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert RerankerPool(tmp_path).spec == ModelSpec(str(tmp_path))
    for name in (ModelSpec(np.str_("org/model")).name, *PoolConfig(devices=np.array(["cpu"])).devices):
        assert type(name) is str
    with pytest.raises(TypeError, match="model: a name, a path or a ModelSpec is needed, not b'model'"):
        ModelSpec(b"model")  # type: ignore[arg-type]
    assert RerankerPool(FAKE).spec is FAKE


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (512, 512),
        (np.int64(2**40), 2**40),
        ("8GiB", 8 * 2**30),
        ("512MB", 512 * 10**6),
        (" 1.5 gib ", 3 * 2**29),
        ("100b", 100),
        ("2kB", 2000),
        ("1TiB", 2**40),
    ],
)
def test_a_size_in_words_is_bytes(given: object, size: int) -> None:
    assert memory_size("memory", given) == size


@pytest.mark.parametrize("given", ["8", "GiB", "8G", "-1GiB", "1e3MB", "8iB", "8 gigabytes", "0MB", 0, -5])
def test_a_size_that_is_none_is_named(given: object) -> None:
    with pytest.raises(ValueError, match=r"^memory: (bytes, or a size such as '8GiB'|at least 1 is needed)"):
        memory_size("memory", given)
    for odd in (True, 1.5, None):
        with pytest.raises(TypeError, match=r"^memory: a whole number is needed"):
            memory_size("memory", odd)
