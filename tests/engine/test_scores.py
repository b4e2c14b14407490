"""A pool's scores are ``CrossEncoder.predict``'s, for every architecture, however requests are cut up and mixed."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import PATIENCE

from mp_rerank import ModelSpec, RerankerPool

pytest.importorskip("torch")
models = pytest.importorskip("models")
pytestmark = pytest.mark.real

MakePool = Callable[..., RerankerPool]

QUERIES = models.TEXT[:4]
DOCUMENTS = [
    *models.TEXT,
    *(" ".join(line.split()[:3]) for line in models.TEXT),
    "",
    " ",
    "\0",
    "\n\t",
    "🙂 e\u0301 \u202eright to left",
    "one word",
    "word " * 5_000,
    "long " + " ".join(models.TEXT) * 20,
    *models.TEXT[:3],
]


#: Families that pools are not tried with, but only the engine within them.
WITHIN = ("electra", "albert", "distilbert", "gte", "mistral", "qwen2", "gemma", "gemma2")
KINDS = [family for family in models.FAMILIES if family not in WITHIN]


class Rivals(NamedTuple):
    """The pool, and the model it must equal."""

    pool: RerankerPool
    model: Any


def close(scores: Any, expected: Any) -> bool:
    return np.shape(scores) == np.shape(expected) and np.allclose(scores, expected, rtol=1e-5, atol=1e-5)


def differ(scores: Any) -> bool:
    """Whether scores are apart by so much that a wrong one would be noticed."""
    return bool((np.std(scores, axis=0) > 1e-2).all())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a model, made when it is first asked for."""
    made: dict[tuple[str, int], str] = {}

    def folder(family: str, num_labels: int = 1) -> str:
        if (family, num_labels) not in made:
            made[family, num_labels] = models.build(family, tmp_path_factory.mktemp(family), num_labels)
        return made[family, num_labels]

    return folder


@pytest.fixture(scope="module", params=KINDS)
def rivals(
    request: pytest.FixtureRequest, folders: Callable[..., str], device: str, fork_server: str
) -> Iterator[Rivals]:
    folder = folders(request.param)
    # Small batches and slices: many boundaries for a pair to get lost at.
    with RerankerPool(folder, devices=device, workers=2, batch_tokens=256, start_method=fork_server) as pool:
        yield Rivals(pool, models.load(folder, device))


def test_any_text_scores_as_in_a_cross_encoder(rivals: Rivals) -> None:
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    expected = rivals.model.predict(pairs)
    assert differ(expected)
    assert close(rivals.pool.submit_pairs(pairs).result(PATIENCE), expected)
    assert close(rivals.pool.predict(pairs), expected)
    assert close(rivals.pool.predict(pairs[0]), expected[0])


def test_it_ranks_as_a_cross_encoder_does(rivals: Rivals) -> None:
    documents = [document for document in dict.fromkeys(DOCUMENTS) if document.strip()]
    ranked = rivals.model.rank(QUERIES[0], documents, return_documents=True)
    assert differ([entry["score"] for entry in ranked])
    by_pool = rivals.pool.rank(QUERIES[0], documents, return_documents=True)
    assert [entry["corpus_id"] for entry in by_pool] == [entry["corpus_id"] for entry in ranked]
    assert [entry["text"] for entry in by_pool] == [entry["text"] for entry in ranked]
    assert close([entry["score"] for entry in by_pool], [entry["score"] for entry in ranked])
    best = rivals.pool.rerank(QUERIES[0], documents, top_n=2)
    assert [result.index for result in best] == [entry["corpus_id"] for entry in ranked[:2]]


def test_requests_cut_up_and_mixed_get_the_scores_they_would_alone(rivals: Rivals) -> None:
    table = rivals.model.predict([(query, document) for query in QUERIES for document in DOCUMENTS])
    table = table.reshape(len(QUERIES), len(DOCUMENTS))
    assert differ(table.ravel())
    before = rivals.pool.stats()
    chance = random.Random(0)
    start = threading.Barrier(8)

    def agent(seed: int) -> list[tuple[list[tuple[int, int]], Any]]:
        chance = random.Random(seed)
        start.wait(PATIENCE)
        sent = []
        for _ in range(6):
            chosen = [
                (chance.randrange(len(QUERIES)), chance.randrange(len(DOCUMENTS)))
                for _ in range(chance.choice([1, 1, 2, 5, 30]))
            ]
            sent.append((chosen, rivals.pool.submit_pairs([(QUERIES[q], DOCUMENTS[d]) for q, d in chosen])))
        return sent

    with ThreadPoolExecutor(8) as agents:
        for sent in agents.map(agent, (chance.random() for _ in range(8))):
            for chosen, future in sent:
                assert close(future.result(PATIENCE), [table[q, d] for q, d in chosen])
    after = rivals.pool.stats()
    assert after.gathered_slices > before.gathered_slices
    assert after.split_requests > before.split_requests


def test_pairs_may_have_three_labels(folders: Callable[..., str], make_pool: MakePool, device: str) -> None:
    folder = folders("bert", 3)
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    model = models.load(folder, device)
    expected = model.predict(pairs)
    assert expected.shape == (len(pairs), 3)
    assert differ(expected)
    with make_pool(folder, devices=device, batch_tokens=256) as pool:
        assert close(pool.submit_pairs(pairs).result(PATIENCE), expected)
        assert close(pool.predict(pairs, apply_softmax=True), model.predict(pairs, apply_softmax=True))
        assert close(pool.predict(pairs[1]), expected[1])
        assert pool.submit_pairs([]).result(PATIENCE).shape == (0, 3)
        with pytest.raises(ValueError, match="3 scores a pair"):
            pool.submit("query", ["document"])


@pytest.mark.parametrize("family", [family for family in KINDS if family != models.LOGIT_SCORE])
def test_three_labels_of_every_architecture_in_a_thread(
    family: str, folders: Callable[..., str], make_pool: MakePool, device: str
) -> None:
    folder = folders(family, 3)
    pairs = [(query, document) for query in QUERIES[:2] for document in DOCUMENTS]
    expected = models.load(folder, device).predict(pairs)
    assert differ(expected)
    with make_pool(folder, devices=device, isolation="thread", batch_tokens=256) as pool:
        assert close(pool.submit_pairs(pairs).result(PATIENCE), expected)


@pytest.fixture(scope="module")
def bert(folders: Callable[..., str], device: str, fork_server: str) -> Iterator[Rivals]:
    folder = folders("bert")
    with RerankerPool(folder, devices=device, workers=2, start_method=fork_server) as pool:
        yield Rivals(pool, models.load(folder, device))


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_any_number_of_documents(bert: Rivals, count: int) -> None:
    documents = [f"{i} " + " ".join(models.TEXT[i % 6].split()[: i % 5]) for i in range(count)]
    expected = bert.model.predict([("Berlin", document) for document in documents]) if count else np.zeros(0)
    results = bert.pool.rerank("Berlin", documents)
    assert sorted(result.index for result in results) == list(range(count))
    assert [result.document for result in results] == [documents[result.index] for result in results]
    assert close([result.relevance_score for result in results], [expected[result.index] for result in results])
    ranked = [result.relevance_score for result in results]
    assert ranked == sorted(ranked, reverse=True)
    assert count < 2 or differ(ranked)


def test_copies_of_a_document_score_the_same_wherever_they_are(bert: Rivals) -> None:
    documents = [models.TEXT[i % 3] if i % 2 else f"{models.TEXT[i % 5]} {i}" for i in range(400)]
    scores = bert.pool.predict([(QUERIES[0], document) for document in documents])
    for text in models.TEXT[:3]:
        copies = [score for score, document in zip(scores, documents, strict=True) if document == text]
        assert len(copies) > 50
        assert close(copies, [bert.model.predict([(QUERIES[0], text)])[0]] * len(copies))


def test_a_lone_surrogate_is_scored_as_u_fffd(bert: Rivals) -> None:
    """Half an emoji, as ordinary JSON has it. Others' pairs in its slice are scored as ever."""
    halves = json.loads(r'["query \ud83d", "document \ude42", "\ud83d"]')
    assert not any(text.isprintable() for text in halves)
    futures = [bert.pool.submit(halves[0], [*halves, text]) for text in models.TEXT]
    clean = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in halves]
    for text, future in zip(models.TEXT, futures, strict=True):
        results = sorted(future.result(PATIENCE), key=lambda result: result.index)
        assert [result.document for result in results] == [*halves, text]
        expected = bert.model.predict([(clean[0], document) for document in [*clean, text]])
        assert close([result.relevance_score for result in results], expected)


def test_equal_scores_keep_the_order_submitted(folders: Callable[..., str], make_pool: MakePool, device: str) -> None:
    folder = folders("llama")
    documents = [f"{models.TEXT[i % 6]} {i}" for i in range(100)]
    model = models.load(folder, device, activation_fn=models.coarse)
    expected = model.predict([(QUERIES[0], document) for document in documents])
    assert 3 < len(set(expected.tolist())) < 60
    with make_pool(ModelSpec(folder, activation="models.coarse"), devices=device, batch_tokens=256) as pool:
        results = pool.rerank(QUERIES[0], documents)
    assert [result.index for result in results] == np.argsort(-expected, kind="stable").tolist()


@pytest.mark.parametrize("family", ["bert", "roberta", "qwen3"])
def test_pairs_are_truncated_to_max_length(
    family: str, folders: Callable[..., str], make_pool: MakePool, device: str
) -> None:
    folder = folders(family)
    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    expected = models.load(folder, device, max_length=16).predict(pairs)
    assert differ(expected)
    assert not close(expected, models.load(folder, device).predict(pairs))
    isolation = "process" if family == "bert" else "thread"
    with make_pool(ModelSpec(folder, max_length=16), devices=device, workers=1, isolation=isolation) as pool:
        assert [worker.max_length for worker in pool.workers()] == [16]
        assert close(pool.predict(pairs), expected)
        same, cut = pool.predict([("query", "word " * 40 + "one"), ("query", "word " * 40 + "other")])
        assert close(same, cut)


@pytest.fixture
def tanh_folder(folders: Callable[..., str], tmp_path: Path, device: str) -> str:
    """A model whose own activation is not the usual one."""
    import torch

    model = models.load(folders("bert"), device, activation_fn=torch.nn.Tanh())
    model.save_pretrained(str(tmp_path))
    return str(tmp_path)


def test_the_activation_is_the_models_own_or_the_one_that_is_asked_for(
    tanh_folder: str, make_pool: MakePool, device: str
) -> None:
    import torch

    pairs = [(query, document) for query in QUERIES for document in DOCUMENTS]
    logits = models.load(tanh_folder, device, activation_fn=torch.nn.Identity()).predict(pairs)
    assert differ(logits)
    own = models.load(tanh_folder, device).predict(pairs)
    assert close(own, np.tanh(logits))
    with make_pool(tanh_folder, devices=device, workers=1) as pool:
        assert close(pool.predict(pairs), own)
    with make_pool(ModelSpec(tanh_folder, activation="identity"), devices=device, workers=1) as pool:
        assert close(pool.predict(pairs), logits)
    for activation, expected in (
        ("sigmoid", 1 / (1 + np.exp(-logits))),
        ("torch.nn.ReLU", np.maximum(logits, 0)),
        ("torch.tanh", np.tanh(logits)),
        ("models.coarse", np.round(logits * 4) / 4),
    ):
        with make_pool(ModelSpec(tanh_folder, activation=activation), devices=device, isolation="thread") as pool:
            assert close(pool.predict(pairs), expected), activation
