"""Pairs a second for many agents: the pool beside what else one can do with a cross-encoder and threads, in one run.

The contenders are loaded first and then take turns, round after round, so that the machine's moods fall on all alike.
The model has MiniLM-L6's shape and random weights: speed does not depend on their values. Scores are compared as well.

The last line says what share of the arithmetic's own speed the pool reaches: each core multiplies matrices of the
model's shapes, in the fastest way that torch has here, all cores at once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import queue
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from mp_rerank import ModelSpec, RerankerPool
from mp_rerank.config import BUILTIN_FOLDER
from mp_rerank.worker import THREAD_VARIABLES

Pairs = list[tuple[str, str]]
Score = Callable[[Pairs], np.ndarray]
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
        contenders = start_contenders(folder, arguments.workers, arguments.agents, stack)
        report = compare(contenders, requests, arguments.rounds)
        report["arithmetic"] = arithmetic(folder, SHAPES[arguments.shape], requests, arguments.workers, report)
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


def start_contenders(folder: str, workers: int, agents: int, stack: ExitStack) -> dict[str, Score]:
    """Load every contender; each scores the pairs of one agent's request."""
    model = CrossEncoder(folder, device="cpu")
    lock = threading.Lock()

    def locked(pairs: Pairs) -> np.ndarray:
        with lock:
            return model.predict(pairs, show_progress_bar=False)

    contenders: dict[str, Score] = {BASELINE: locked}

    models: queue.SimpleQueue[CrossEncoder] = queue.SimpleQueue()
    for _ in range(agents):
        models.put(CrossEncoder(folder, device="cpu"))

    def each_its_own(pairs: Pairs) -> np.ndarray:
        own = models.get()
        try:
            return own.predict(pairs, show_progress_bar=False)
        finally:
            models.put(own)

    contenders["one CrossEncoder for each thread, loaded one by one"] = each_its_own

    # Named for its callers: used from several threads without a lock, its results go to the wrong ones.
    starter = CrossEncoder(folder, device="cpu")
    processes = starter.start_multi_process_pool(["cpu"] * workers)
    stack.callback(starter.stop_multi_process_pool, processes)
    with threads_of_children(1):
        tuned = starter.start_multi_process_pool(["cpu"] * workers)
    stack.callback(starter.stop_multi_process_pool, tuned)
    pool_lock = threading.Lock()

    def library_pool(pairs: Pairs) -> np.ndarray:
        with pool_lock:
            return starter.predict(pairs, pool=processes, show_progress_bar=False)

    def library_pool_tuned(pairs: Pairs) -> np.ndarray:
        with pool_lock:
            chunk = max(1, -(-len(pairs) // (2 * workers)))
            return starter.predict(pairs, pool=tuned, chunk_size=chunk, batch_size=8, show_progress_bar=False)

    contenders["CrossEncoder's own pool and a lock, as it comes"] = library_pool
    contenders["CrossEncoder's own pool and a lock, tuned"] = library_pool_tuned

    executor = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=load, initargs=(folder,))
    stack.callback(executor.shutdown)
    contenders["ProcessPoolExecutor, a model in each process"] = lambda pairs: executor.submit(predict, pairs).result()

    for dtype in ("float32", "bfloat16"):
        pool = stack.enter_context(RerankerPool(ModelSpec(folder, dtype=dtype), devices="cpu", workers=workers))
        contenders[f"mp_rerank, {dtype}"] = lambda pairs, pool=pool: pool.submit_pairs(pairs).result()
    return contenders


@contextmanager
def threads_of_children(count: int) -> Iterator[None]:
    """Processes started within compute with `count` threads."""
    before = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(count)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def load(folder: str) -> None:
    """The initializer of the plain executor's processes."""
    global _model
    torch.set_num_threads(1)
    _model = CrossEncoder(folder, device="cpu")


def predict(pairs: Pairs) -> np.ndarray:
    """The plain executor's task."""
    return _model.predict(pairs, show_progress_bar=False)


def arithmetic(
    folder: str, shape: dict[str, int], requests: list[Pairs], workers: int, report: dict
) -> dict[str, float]:
    """The matrix products' own best rate on all cores, and the share of it that the pool's float32 rate comes to."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [pair for request in requests for pair in request]
    tokens = sum(map(len, tokenizer([q for q, _ in texts], [d for _, d in texts])["input_ids"])) / len(texts)
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    operations = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)  # of a token
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        rates = executor.map(multiply, [hidden] * workers, [inner] * workers)
        best = sum(rates)
    ours = next(row["pairs_per_second"] for row in report["contenders"] if row["name"] == "mp_rerank, float32")
    return {
        "tokens_a_pair": tokens,
        "best_gflops": best / 1e9,
        "our_gflops": ours * tokens * operations / 1e9,
        "share": ours * tokens * operations / best,
    }


def multiply(hidden: int, inner: int, seconds: float = 6.0) -> float:
    """Operations a second of one core on the model's shapes, prepacked; the best of many short trials."""
    torch.set_num_threads(1)
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]
    with torch.inference_mode():
        layers = [torch.nn.Linear(*size) for size in shapes]
        weights = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1024) for layer in layers]
        inputs = [torch.randn(1024, size[0]) for size in shapes]
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            for layer, weight, rows in zip(layers, weights, inputs, strict=True):
                torch.ops.mkldnn._linear_pointwise(rows, weight, layer.bias, "none", [], "")
            best = min(best, time.perf_counter() - start)
    return sum(2 * 1024 * rows * columns for rows, columns in shapes) / best


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
    found = report["arithmetic"]
    print(
        f"{found['tokens_a_pair']:.0f} tokens a pair; mp_rerank in float32 {found['our_gflops']:.0f} GFLOP/s of the "
        f"{found['best_gflops']:.0f} that bare matrix products reach: {found['share']:.0%}"
    )
