"""Pairs a second for many agents: the pool beside one model with a lock and the library's own pool, in one run.

The contenders are loaded first and then take turns, round after round, so that the machine's moods fall on all alike.
The model has MiniLM-L6's shape and random weights: speed does not depend on their values. Scores are compared as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from mp_rerank import RerankerPool
from mp_rerank.config import BUILTIN_FOLDER

Score = Callable[[list[tuple[str, str]]], np.ndarray]
SHAPES = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
BASELINE = "one CrossEncoder, a lock"


def main(argv: Sequence[str]) -> int:
    """Run the comparison and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench throughput", description=__doc__)
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--documents", type=int, default=50, help="documents a request (default 50)")
    parser.add_argument("--words", type=int, default=60, help="mean words a document (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds each contender takes (default 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a CPU)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        make_model(folder, SHAPES[arguments.shape])
        requests = make_requests(arguments.agents, arguments.documents, arguments.words)
        contenders = start_contenders(folder, arguments.workers, stack)
        report = compare(contenders, requests, arguments.rounds)
    report["machine"] = {
        "cpus": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "sentence-transformers")},
    }
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)
    return 0


def make_model(folder: str, shape: dict[str, int]) -> None:
    """Save a model of ``shape`` with random weights, and the built-in model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_FOLDER)
    torch.manual_seed(0)
    # A wider spread than BERT's 0.02, so that scores differ and a mix-up would show; narrower for wider layers, whose
    # sums would otherwise saturate.
    model = BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), num_labels=1, initializer_range=2 / shape["hidden_size"] ** 0.5, **shape)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_requests(agents: int, documents: int, words: int) -> list[list[tuple[str, str]]]:
    """One request an agent: a query and documents of random words, of lengths spread around ``words``."""
    chance = random.Random(0)
    vocabulary = [w for w in AutoTokenizer.from_pretrained(BUILTIN_FOLDER).get_vocab() if w.isalpha() and len(w) > 2]
    vocabulary.sort()

    def text(length: float) -> str:
        return " ".join(chance.choices(vocabulary, k=max(3, int(length))))

    return [
        [(query, text(chance.gauss(words, words / 3))) for _ in range(documents)]
        for query in (text(8) for _ in range(agents))
    ]


def start_contenders(folder: str, workers: int, stack: ExitStack) -> dict[str, Score]:
    """Load every contender; each scores the pairs of one agent's request."""
    model = CrossEncoder(folder, device="cpu")
    lock = threading.Lock()

    def locked(pairs: list[tuple[str, str]]) -> np.ndarray:
        with lock:
            return model.predict(pairs, show_progress_bar=False)

    contenders: dict[str, Score] = {BASELINE: locked}

    # Named for its callers: used from several threads without a lock, its results go to the wrong ones.
    starter = CrossEncoder(folder, device="cpu")
    processes = starter.start_multi_process_pool(["cpu"] * workers)
    stack.callback(starter.stop_multi_process_pool, processes)
    pool_lock = threading.Lock()

    def library_pool(pairs: list[tuple[str, str]]) -> np.ndarray:
        with pool_lock:
            return starter.predict(pairs, pool=processes, show_progress_bar=False)

    contenders[f"CrossEncoder's own pool, {workers} processes, a lock"] = library_pool

    pool = stack.enter_context(RerankerPool(folder, devices="cpu", workers=workers))
    contenders[f"mp_rerank, {workers} workers"] = lambda pairs: pool.submit_pairs(pairs).result()
    return contenders


def compare(contenders: dict[str, Score], requests: list[list[tuple[str, str]]], rounds: int) -> dict:
    """Rates of each contender over ``rounds`` interleaved rounds, and how far its scores are from the first's."""
    pairs = sum(len(request) for request in requests)
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    scores: dict[str, np.ndarray] = {}
    with ThreadPoolExecutor(len(requests)) as agents:
        for turn in range(rounds + 1):  # the first is a warm-up
            for name, score in contenders.items():
                start = time.perf_counter()
                scores[name] = np.concatenate(list(agents.map(score, requests)))
                if turn:
                    rates[name].append(pairs / (time.perf_counter() - start))
    baseline = scores[BASELINE]
    return {
        "pairs_a_round": pairs,
        "rounds": rounds,
        "contenders": [
            {
                "name": name,
                "pairs_per_second": statistics.median(rates[name]),
                "slowest": min(rates[name]),
                "fastest": max(rates[name]),
                "times_the_lock": statistics.median(
                    ours / theirs for ours, theirs in zip(rates[name], rates[BASELINE], strict=True)
                ),
                "largest_score_difference": float(np.abs(scores[name] - baseline).max()),
            }
            for name in contenders
        ],
    }


def print_table(report: dict) -> None:
    """The report as Markdown."""
    print("| contender | pairs/s, median (range) | times the lock | largest score difference |")
    print("|---|---|---|---|")
    for row in report["contenders"]:
        print(
            f"| {row['name']} | {row['pairs_per_second']:.0f} ({row['slowest']:.0f} to {row['fastest']:.0f}) "
            f"| {row['times_the_lock']:.2f} | {row['largest_score_difference']:.1e} |"
        )
    print(f"\n{report['pairs_a_round']} pairs a round, {report['rounds']} rounds; {report['machine']}")
