"""Ten Langroid ``DocChatAgent`` tasks in threads, each with a Qdrant store in memory: errors and seconds by round.

    python bench/faults/langroid_tasks.py --arm pool        # rerank with a pool, after mp_rerank's install()
    python bench/faults/langroid_tasks.py --arm own         # rerank as Langroid does: one model behind a lock
    python bench/faults/langroid_tasks.py --arm original    # as Langroid did before: each rerank loads a model

Run each arm in a process of its own: on transformers 4, loads fail in a process in which the original arm has failed.
Nothing is downloaded: the model is the built-in one, embeddings are hashed words, the language model is Langroid's
mock. The last line of output is JSON: arm, tasks, errors with their texts, seconds, pairs scored, versions.
"""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
import warnings
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

import numpy as np
import tiktoken

# Langroid counts tokens with an encoding that tiktoken would download: bytes take its place.
for _name in ("cl100k_base", "o200k_base"):
    tiktoken.registry.ENCODINGS[_name] = tiktoken.Encoding(
        _name, pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )

warnings.simplefilter("ignore")

import langroid as lr  # noqa: E402
from langroid.agent.special import doc_chat_agent  # noqa: E402
from langroid.agent.special.doc_chat_agent import DocChatAgent, DocChatAgentConfig  # noqa: E402
from langroid.embedding_models.base import EmbeddingModel, EmbeddingModelsConfig  # noqa: E402
from langroid.language_models.mock_lm import MockLMConfig  # noqa: E402
from langroid.mytypes import DocMetaData, Document  # noqa: E402
from langroid.parsing import search  # noqa: E402
from langroid.utils.configuration import settings  # noqa: E402
from langroid.vector_store.qdrantdb import QdrantDBConfig  # noqa: E402

from mp_rerank.config import BUILTIN, BUILTIN_FOLDER  # noqa: E402
from mp_rerank.integrations import langroid as integration  # noqa: E402
from mp_rerank.shared import shared_pool  # noqa: E402

ANIMALS = ["heron", "otter", "lynx", "beaver", "falcon", "badger", "marten", "osprey", "weasel", "curlew"]
TRAITS = ["eats fish at dawn", "nests near water", "lives for twelve years", "hunts alone at night", "sleeps in winter"]
FILLER = "It was described by naturalists of the nineteenth century, who drew it from life and kept long records. "

# BM25 and fuzzy matching clean texts with word lists that NLTK would download: lower case takes their place.
search.preprocess_text = doc_chat_agent.preprocess_text = str.lower


class HashedWords(EmbeddingModel):
    """Embeddings of hashed words, for the vector store."""

    def __init__(self, config: EmbeddingModelsConfig) -> None:
        self.config = config

    def embedding_fn(self) -> Any:
        """A function that embeds a list of texts."""
        return lambda texts: [self._embed(text) for text in texts]

    @property
    def embedding_dims(self) -> int:
        """The length of an embedding."""
        return 128

    def _embed(self, text: str) -> list[float]:
        vector = np.full(self.embedding_dims, 1e-3)
        for word in text.lower().split():
            vector[zlib.crc32(word.encode()) % self.embedding_dims] += 1.0
        vector /= np.linalg.norm(vector)
        unit: list[float] = vector.tolist()
        return unit


def documents(animal: str, filler: int) -> list[Document]:
    """The 30 passages of one agent, each of one fact and ``filler`` sentences of some 20 tokens."""
    return [
        Document(content=f"The {animal} {trait}. {FILLER * filler}", metadata=DocMetaData(source=f"{animal} {i} {j}"))
        for i, trait in enumerate(TRAITS)
        for j in range(6)
    ]


def make_task(animal: str, model: str, filler: int) -> lr.Task:
    """A task with an agent and a vector store of its own."""
    agent = DocChatAgent(
        DocChatAgentConfig(
            llm=MockLMConfig(default_response="It does, says [0]."),
            vecdb=QdrantDBConfig(
                cloud=False,
                storage_path=":memory:",
                collection_name=animal,
                replace_collection=True,
                embedding=EmbeddingModelsConfig(dims=128),
                embedding_model=HashedWords(EmbeddingModelsConfig(dims=128)),
            ),
            cross_encoder_reranking_model=model,
            cross_encoder_device="cpu",
            relevance_extractor_config=None,
            conversation_mode=False,
            rerank_diversity=False,
            n_similar_chunks=10,
            n_relevant_chunks=3,
        )
    )
    agent.ingest_docs(documents(animal, filler), split=False)
    return lr.Task(agent, interactive=False, single_round=True, restart=True)


def load_each_time(model_name: str, device: str | None) -> Any:
    """Load a model, as Langroid did before it had a cache: nothing is shared, nothing is locked."""
    from sentence_transformers import CrossEncoder

    return doc_chat_agent._CrossEncoderCacheEntry(model=CrossEncoder(model_name, device=device), lock=nullcontext())


def run(arm: str, tasks: int, rounds: int, filler: int) -> dict[str, Any]:
    """The figures of one arm."""
    model = BUILTIN if arm == "pool" else str(BUILTIN_FOLDER)
    if arm == "pool":
        integration.install()
    elif arm == "original":
        doc_chat_agent._get_cross_encoder_entry = load_each_time
    pairs, seconds_reranking = 0, 0.0
    counting = threading.Lock()
    rerank = DocChatAgent.rerank_with_cross_encoder

    def counted(self: DocChatAgent, query: str, passages: list[Document]) -> list[Document]:
        nonlocal pairs, seconds_reranking
        start = time.perf_counter()
        ranked = rerank(self, query, passages)
        with counting:
            pairs += len(passages)
            seconds_reranking += time.perf_counter() - start
        return ranked

    DocChatAgent.rerank_with_cross_encoder = counted
    made = [make_task(ANIMALS[i % len(ANIMALS)], model, filler) for i in range(tasks)]
    errors: Counter[str] = Counter()
    reranked: list[float] = []

    def ask(number: int, task: lr.Task) -> None:
        try:
            answer = task.run(f"When does the {ANIMALS[number % len(ANIMALS)]} hunt, round {len(reranked)}?")
            assert answer is not None
            assert "says" in answer.content
        except Exception as error:
            errors[f"{type(error).__name__}: {error}"[:120]] += 1

    with ThreadPoolExecutor(tasks) as threads:
        for _ in range(rounds):
            start = time.perf_counter()
            list(threads.map(ask, range(tasks), made))
            reranked.append(time.perf_counter() - start)
    if arm == "pool":
        stats = shared_pool(model, "cpu").stats()
        assert stats.scored_pairs + stats.coalesced_pairs == pairs or errors
    return {
        "arm": arm,
        "tasks": tasks * rounds,
        "errors": sum(errors.values()),
        "messages": dict(errors),
        "first_round": round(reranked[0], 2),
        "later_rounds": round(float(np.median(reranked[1:] or reranked)), 3),
        "seconds": round(sum(reranked), 2),
        "mean_rerank_seconds": round(seconds_reranking / (tasks * rounds), 3),
        "pairs": pairs,
        **{name: version(name) for name in ("langroid", "transformers", "sentence-transformers", "torch")},
    }


def main() -> None:
    """Run one arm and print its figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arm", choices=("pool", "own", "original"), required=True)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--filler", type=int, default=3, help="sentences that make each passage longer")
    options = parser.parse_args()
    settings.quiet = True
    settings.progress = False
    logging.disable(logging.WARNING)
    print(json.dumps(run(options.arm, options.tasks, options.rounds, options.filler)))


if __name__ == "__main__":
    main()
