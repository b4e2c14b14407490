"""The pool in Langroid's ``DocChatAgent``: the seam, the configuration's meaning, and ten tasks at once."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from fakes import score_of
from frameworks import need

from mp_rerank import ModelSpec, RerankerPool

tiktoken = need("tiktoken")
for _name in ("cl100k_base", "o200k_base"):  # Langroid counts tokens with an encoding that tiktoken would download
    tiktoken.registry.ENCODINGS[_name] = tiktoken.Encoding(
        _name, pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
need("langroid.agent.special.doc_chat_agent")

from langroid.agent.special import doc_chat_agent  # noqa: E402
from langroid.agent.special.doc_chat_agent import DocChatAgent, DocChatAgentConfig  # noqa: E402
from langroid.mytypes import DocMetaData, Document  # noqa: E402

from mp_rerank.integrations import langroid as integration  # noqa: E402

MakePool = Callable[..., RerankerPool]
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def asked(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What the shared pool was asked for; the answer is a pool of the fake model."""
    calls: list[tuple[Any, ...]] = []
    pool = make_pool()

    def shared_pool(model: str, device: str | None, **options: Any) -> RerankerPool:
        calls.append((model, device, options))
        return pool

    monkeypatch.setattr(integration, "shared_pool", shared_pool)
    yield calls
    integration.uninstall()


def agent(kind: type, **config: Any) -> Any:
    """As much of an agent as reranking needs: its class and its configuration."""
    made = object.__new__(kind)
    made.config = DocChatAgentConfig(**config)
    return made


class Mixed(integration.PoolRerankMixin, DocChatAgent):
    pool_options = {"workers": 7}  # noqa: RUF012


def passages_of(query: str) -> list[Document]:
    return [Document(content=f"{query}, passage {i}", metadata=DocMetaData(source=f"file {i}")) for i in range(30)]


def expected(query: str) -> list[str]:
    return sorted((p.content for p in passages_of(query)), key=lambda text: -score_of(query, text))


def test_langroids_private_names_are_as_they_were() -> None:
    assert version("langroid").startswith("0.69.")
    assert doc_chat_agent._get_cross_encoder_entry.__module__ == doc_chat_agent.__name__
    assert list(inspect.signature(doc_chat_agent._get_cross_encoder_entry).parameters) == ["model_name", "device"]
    assert [f.name for f in dataclasses.fields(doc_chat_agent._CrossEncoderCacheEntry)] == ["model", "lock"]
    source = inspect.getsource(DocChatAgent.rerank_with_cross_encoder)
    for words in ("_get_cross_encoder_entry(", "with entry.lock:", "entry.model.predict("):
        assert words in source
    assert {"cross_encoder_reranking_model", "cross_encoder_device"} <= set(DocChatAgentConfig.model_fields)


@pytest.mark.parametrize("kind", [DocChatAgent, Mixed], ids=["install", "mixin"])
def test_agents_in_threads_rerank_in_the_pool(asked: list[tuple[Any, ...]], kind: type) -> None:
    if kind is DocChatAgent:
        integration.install(workers=7)
    one = agent(kind, cross_encoder_reranking_model="some/model", cross_encoder_device="cuda:1")
    queries = [f"query {i}" for i in range(40)]
    with ThreadPoolExecutor(10) as threads:
        ranked = list(threads.map(lambda q: one.rerank_with_cross_encoder(q, passages_of(q)), queries))
    assert [[p.content for p in passages] for passages in ranked] == [expected(q) for q in queries]
    assert asked == [("some/model", "cuda:1", {"workers": 7})] * 40


@pytest.mark.parametrize("kind", [DocChatAgent, Mixed], ids=["install", "mixin"])
def test_passages_come_back_as_they_are(asked: list[tuple[Any, ...]], kind: type) -> None:
    integration.install()
    given = passages_of("query")
    before = copy.deepcopy(given)
    ranked = agent(kind).rerank_with_cross_encoder("query", given)
    assert given == before
    assert {id(p) for p in ranked} == {id(p) for p in given}
    assert asked[0][1] is None  # no device: the best there is, as in Langroid


def test_agents_do_not_wait_for_each_other(asked: list[tuple[Any, ...]]) -> None:
    """Two reranks are inside the model's call at the same time."""
    integration.install()
    entry = doc_chat_agent._get_cross_encoder_entry("model", None)
    both = threading.Barrier(2)

    def inside() -> None:
        with entry.lock:
            both.wait(PATIENCE)

    with ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(inside), threads.submit(inside)]:
            done.result(PATIENCE)


def test_uninstall_gives_langroid_its_cache_back(asked: list[tuple[Any, ...]]) -> None:
    theirs = doc_chat_agent._get_cross_encoder_entry
    integration.install()
    assert doc_chat_agent._get_cross_encoder_entry is not theirs
    integration.uninstall()
    assert doc_chat_agent._get_cross_encoder_entry is theirs


def test_another_langroid_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration, "_original", lambda model_name: None)
    with pytest.raises(RuntimeError, match="no cache of cross-encoders that is known here"):
        integration.install()
    monkeypatch.setattr(integration, "_original", None)
    with pytest.raises(RuntimeError, match="no cache of cross-encoders that is known here"):
        integration.install()


def test_importing_and_installing_ask_no_network_and_import_no_torch() -> None:
    script = """
import socket, sys, tiktoken, warnings
warnings.simplefilter("ignore")
def refuse(*_, **__): raise AssertionError("the network was asked")
socket.getaddrinfo = socket.create_connection = refuse
for name in ("cl100k_base", "o200k_base"):
    tiktoken.registry.ENCODINGS[name] = tiktoken.Encoding(
        name, pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={})
import langroid.agent.special.doc_chat_agent
before = set(sys.modules)
from mp_rerank.integrations import langroid
langroid.install()
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"torch", "transformers", "sentence_transformers"}, new
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.real
def test_ten_tasks_at_once_twenty_times_over_a_vector_store() -> None:
    """Real agents, tasks, Qdrant in memory and the built-in model; the figures are in the captured output (-rP)."""
    done = subprocess.run(
        [sys.executable, ROOT / "bench/faults/langroid_tasks.py", "--arm", "pool", "--rounds", "20", "--filler", "0"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    print(figures)
    assert (figures["tasks"], figures["errors"], figures["messages"]) == (200, 0, {})
    assert figures["pairs"] >= 200 * 20


def test_options_of_a_request(make_pool: MakePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = make_pool(ModelSpec("fake", loader="fakes:load_reading", max_length=20))
    monkeypatch.setattr(integration, "shared_pool", lambda *_, **__: pool)
    best = sorted((p.content for p in passages_of("query")), key=lambda text: -score_of("judge: query", text))

    class Judging(integration.PoolRerankMixin, DocChatAgent):
        request_options = {"instruction": "judge: ", "caller": "agent"}  # noqa: RUF012

    ranked = agent(Judging).rerank_with_cross_encoder("query", passages_of("query"))
    assert [passage.content for passage in ranked] == best
    assert "agent" in pool.stats().callers
    integration.install(request_options={"instruction": "judge: "})
    try:
        ranked = agent(DocChatAgent).rerank_with_cross_encoder("query", passages_of("query"))
        assert [passage.content for passage in ranked] == best
    finally:
        integration.uninstall()
