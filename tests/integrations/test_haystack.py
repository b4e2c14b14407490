"""The pool in Haystack: a real pipeline, from YAML, in threads and in asyncio."""

from __future__ import annotations

import asyncio
import copy
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fakes import score_of
from frameworks import need

from mp_rerank import RerankerPool

need("haystack")

from haystack import Document, Pipeline  # noqa: E402
from haystack.components.retrievers import InMemoryBM25Retriever  # noqa: E402
from haystack.document_stores.in_memory import InMemoryDocumentStore  # noqa: E402
from haystack.utils import ComponentDevice, Device, DeviceMap  # noqa: E402

from mp_rerank.integrations.haystack import PoolRanker  # noqa: E402

FAKE_PARAMETERS: dict[str, Any] = {
    "model": "fake",
    "device": "cpu",
    "model_options": {"loader": "fakes:load"},
    "pool_options": {"workers": 2},
}

YAML = """
components:
  ranker:
    type: mp_rerank.integrations.haystack.PoolRanker
    init_parameters:
      model: fake
      device: cpu
      top_k: 3
      meta_fields_to_embed: [title]
      model_options: {loader: "fakes:load"}
      pool_options: {workers: 2}
connections: []
"""
TRUSTED = ["mp_rerank.integrations.haystack"]


pytestmark = pytest.mark.usefixtures("own_registry")


def documents_of(query: str) -> list[Document]:
    return [
        Document(id=f"id {i}", content=f"{query}, document {i}", meta={"title": f"title {i}"}, score=0.5)
        for i in range(20)
    ]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def expected(query: str, top_k: int) -> list[tuple[str, float]]:
    scored = [(d.id, score_of(query, f"{d.meta['title']}\n{d.content}")) for d in documents_of(query)]
    return [(id_, pytest.approx(sigmoid(score))) for id_, score in sorted(scored, key=lambda pair: -pair[1])[:top_k]]


def plain(documents: list[Document]) -> list[tuple[str, float | None]]:
    return [(d.id, d.score) for d in documents]


def asked(i: int) -> dict[str, Any]:
    return {"ranker": {"query": f"query {i}", "documents": documents_of(f"query {i}")}}


def test_many_threads_run_one_pipeline_from_yaml() -> None:
    pipeline = Pipeline.loads(YAML, allowed_modules=TRUSTED)
    with ThreadPoolExecutor(16) as agents:
        for i, result in enumerate(agents.map(lambda i: pipeline.run(asked(i)), range(64))):
            assert plain(result["ranker"]["documents"]) == expected(f"query {i}", 3)


def test_many_tasks_run_one_pipeline_on_the_pools_futures(monkeypatch: pytest.MonkeyPatch) -> None:
    async def agents() -> list[Any]:
        pipeline = Pipeline.loads(YAML, allowed_modules=TRUSTED)
        return await asyncio.gather(*(pipeline.run_async(asked(i)) for i in range(32)))

    monkeypatch.setattr(RerankerPool, "rerank", None)  # what waiting in a thread would call
    for i, result in enumerate(asyncio.run(agents())):
        assert plain(result["ranker"]["documents"]) == expected(f"query {i}", 3)


def test_after_a_retriever() -> None:
    store = InMemoryDocumentStore()
    store.write_documents([Document(content=f"Berlin, document {i}") for i in range(30)])
    pipeline = Pipeline()
    pipeline.add_component("retriever", InMemoryBM25Retriever(store, top_k=30))
    pipeline.add_component("ranker", PoolRanker(top_k=5, **FAKE_PARAMETERS))
    pipeline.connect("retriever.documents", "ranker.documents")
    result = pipeline.run({"retriever": {"query": "Berlin"}, "ranker": {"query": "Berlin"}})
    texts = [d.content for d in result["ranker"]["documents"]]
    assert texts == sorted((f"Berlin, document {i}" for i in range(30)), key=lambda t: -score_of("Berlin", t))[:5]


def test_yaml_and_back_keeps_every_parameter() -> None:
    pipeline = Pipeline()
    ranker = PoolRanker(
        top_k=7, query_prefix="q: ", document_prefix="d: ", scale_score=False, score_threshold=0.25, **FAKE_PARAMETERS
    )
    pipeline.add_component("ranker", ranker)
    again = Pipeline.loads(pipeline.dumps(), allowed_modules=TRUSTED).get_component("ranker")
    assert isinstance(again, PoolRanker)
    assert again.to_dict() == ranker.to_dict()
    assert again.pool is ranker.pool


def test_a_component_device_is_its_name_also_from_yaml() -> None:
    given = {**FAKE_PARAMETERS, "device": ComponentDevice.from_str("cuda:1")}
    ranker = PoolRanker(**given)
    assert ranker.device == "cuda:1"
    assert ranker.pool.config.devices == ("cuda:1",)
    assert PoolRanker(**{**given, "device": given["device"].to_dict()}).pool is ranker.pool
    assert PoolRanker.from_dict(ranker.to_dict()).pool is ranker.pool
    assert PoolRanker(**{**given, "device": None}).device is None
    split = ComponentDevice.from_multiple(DeviceMap({"a": Device.gpu(0), "b": Device.cpu()}))
    with pytest.raises(ValueError, match="device: one device is needed, not ComponentDevice"):
        PoolRanker(**{**given, "device": split})


def test_warming_up_starts_the_pool_and_does_so_once() -> None:
    ranker = PoolRanker(**FAKE_PARAMETERS)
    assert ranker.pool.workers() == []
    ranker.warm_up()
    asyncio.run(ranker.warm_up_async())
    assert [w.generation for w in ranker.pool.workers()] == [1, 1]


def test_scores_are_sigmoids_or_logits_and_may_have_a_threshold() -> None:
    ranker = PoolRanker(top_k=None, **FAKE_PARAMETERS)
    assert ranker.pool.spec.activation == "torch.nn.Identity"
    documents = documents_of("query")
    scaled = ranker.run("query", documents)["documents"]
    bare = ranker.run("query", documents, scale_score=False)["documents"]
    logits = [score_of("query", d.content or "") for d in bare]
    assert [d.score for d in bare] == logits == sorted(logits, reverse=True)
    assert [d.score for d in scaled] == [pytest.approx(sigmoid(logit)) for logit in logits]
    over = ranker.run("query", documents, scale_score=False, score_threshold=0.5)["documents"]
    assert [d.score for d in over] == [logit for logit in logits if logit >= 0.5]
    assert 0 < len(over) < 20
    assert len(ranker.run("query", documents, top_k=4)["documents"]) == 4


def test_prefixes_go_before_query_and_text() -> None:
    ranker = PoolRanker(query_prefix="q: ", document_prefix="d: ", scale_score=False, **FAKE_PARAMETERS)
    [document] = ranker.run("query", [Document(content="text", meta={"title": "t"})])["documents"]
    assert document.score == score_of("q: query", "d: text")


def test_documents_given_are_left_as_they_were_and_come_back_once_each() -> None:
    given = documents_of("query")
    ranked = PoolRanker(top_k=None, **FAKE_PARAMETERS).run("query", [*given, *given])["documents"]
    assert given == documents_of("query")
    assert all(d.score == 0.5 for d in given)
    assert sorted(d.id for d in ranked) == sorted(d.id for d in given)
    assert {d.id: d.meta for d in ranked} == {d.id: d.meta for d in given}


def test_nothing_and_mistakes() -> None:
    ranker = PoolRanker(**FAKE_PARAMETERS)
    assert ranker.run("query", [])["documents"] == []
    with pytest.raises(ValueError, match="top_k: at least 1"):
        PoolRanker(top_k=0)
    with pytest.raises(ValueError, match="top_k: at least 1"):
        ranker.run("query", [], top_k=-1)


def test_a_relative_path_is_looked_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    ranker = PoolRanker("tiny", "cpu")
    monkeypatch.chdir("/")
    assert ranker.pool.spec.name == str(tmp_path / "tiny")
    assert ranker.to_dict()["init_parameters"]["model"] == "tiny"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"scale_score": "false"}, TypeError, "scale_score: True or False is needed, not 'false'"),
        ({"top_k": "5"}, TypeError, "top_k: a whole number is needed, not '5'"),
        ({"top_k": 0}, ValueError, "top_k: at least 1 is needed, not 0"),
        ({"score_threshold": "0.5"}, TypeError, "score_threshold: a number is needed, not '0.5'"),
    ],
)
def test_a_bad_option_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        PoolRanker(**options)
    with pytest.raises(error, match=words):
        PoolRanker(**FAKE_PARAMETERS).run("query", [], **options)
    with pytest.raises(TypeError, match="meta_fields_to_embed: a list of names is needed, not 'title'"):
        PoolRanker(meta_fields_to_embed="title")  # type: ignore[arg-type]


def test_a_copy_has_the_same_pool() -> None:
    ranker = PoolRanker(**FAKE_PARAMETERS)
    assert copy.deepcopy(ranker).pool is ranker.pool


def test_options_of_a_request() -> None:
    options = {"instruction": "judge: ", "long_documents": "chunk"}
    reading = {"loader": "fakes:load_reading", "max_length": 8}
    ranker = PoolRanker(**{**FAKE_PARAMETERS, "model_options": reading}, request_options=options)
    document = Document(content="a b c d e f g h i j", meta={"page": 1})
    best = max(["a b c d e f", "g h i j"], key=lambda part: score_of("judge: query", part))
    for found in (ranker.run("query", [document]), asyncio.run(ranker.run_async("query", [document]))):
        (ranked,) = found["documents"]
        assert ranked.score == pytest.approx(sigmoid(score_of("judge: query", best)))
        assert ranked.meta == {"page": 1, "relevant_passage": best}
    assert PoolRanker.from_dict(ranker.to_dict()).request_options == options
    for wrong, error in (({"instructions": "judge: "}, TypeError), ({"min_score": 0.5}, ValueError)):
        with pytest.raises(error, match=next(iter(wrong))):
            PoolRanker("fake", request_options=wrong)
