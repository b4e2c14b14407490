"""`python -m bench backends`: speed, agreement with float32, and memory of each backend and dtype, and of one
CrossEncoder behind a lock.

All contenders for a model are started first. Then they take turns, round after round, so that other load on the machine
slows all of them alike. Two models are measured. One has random weights in MiniLM-L6's shape and random texts: it shows
the speed at a usual size. The other, with `--data`, is the built-in model on Vaswani's queries and BM25's candidates:
it shows how well 16 and 8 bits rank, which random weights cannot. Kendall's tau and the overlap of the best ten are
means over queries.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau
from sentence_transformers import CrossEncoder

from bench.inputs.models import SHAPES, Pairs, make_model, make_requests
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelLoadError, ModelSpec, RerankerPool

LOCK = "one CrossEncoder, a lock, float32"
CONTENDERS: dict[str, dict[str, Any]] = {
    "torch float32": {"dtype": "float32"},
    "torch bfloat16": {"dtype": "bfloat16"},
    "onnx float32": {"backend": "onnx", "dtype": "float32"},
    "onnx int8": {"backend": "onnx", "dtype": "int8"},
    "openvino float32": {"backend": "openvino", "dtype": "float32"},
    "openvino bfloat16": {"backend": "openvino", "dtype": "bfloat16"},
    "openvino int8": {"backend": "openvino", "dtype": "int8"},
}
TOP = 10


def main(argv: Sequence[str]) -> int:
    """Measure each model and write."""
    parser = argparse.ArgumentParser(prog="python -m bench backends", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, help="the folder with vaswani/ (default: no real texts)")
    parser.add_argument("--queries", type=int, default=16, help="queries a round, each asked by a thread (default 16)")
    parser.add_argument("--documents", type=int, default=50, help="documents a query (default 50)")
    parser.add_argument("--words", type=int, default=60, help="mean words of a random document (default 60)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds each contender takes (default 5)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a CPU)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("backends", "Backends", options)
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, SHAPES[options.shape])
        requests = make_requests(options.queries, options.documents, options.words)
        measure(report, f"{options.shape}, random", folder, requests, options)
    if options.data is None:
        report.note("The built-in model is left out: its texts are in --data.")
    else:
        requests = real_requests(options.data, options.queries, options.documents)
        measure(report, "built-in, Vaswani", ModelSpec().path, requests, options)
    finish(report, options.out)
    return 0


def real_requests(data: Path, queries: int, documents: int) -> list[Pairs]:
    """The first `queries` of Vaswani, each with its best `documents` by BM25."""
    from bench.inputs.datasets import vaswani
    from bench.quality.retrieval import BM25

    collection = vaswani(data)
    texts = list(collection.documents.values())
    asked = list(collection.queries.values())[:queries]
    found, _ = BM25(texts).top(asked, documents)
    return [[(query, texts[i]) for i in row] for query, row in zip(asked, found, strict=True)]


def measure(report: Report, title: str, model: str, requests: list[Pairs], options: argparse.Namespace) -> None:
    """Measure all contenders on `requests`, submitted at once; note the reason for each that cannot be started."""
    with ExitStack() as stack:
        contenders = {LOCK: locked(model)}
        pools: dict[str, RerankerPool] = {}
        started: dict[str, float] = {}
        for name in options.only:
            begun = time.perf_counter()
            pool = RerankerPool(ModelSpec(model, **CONTENDERS[name]), devices="cpu", workers=options.workers)
            try:
                pools[name] = stack.enter_context(pool)
            except ModelLoadError as error:
                report.note(f"{title}, {name}: not run: {error.cause}")
                continue
            started[name] = time.perf_counter() - begun
            contenders[name] = lambda pairs, pool=pool: pool.submit_pairs(pairs).result()
            print(f"{name}: started in {started[name]:.1f} s", file=sys.stderr)
        rates, scores = take_turns(contenders, requests, options.rounds)
        for name in contenders:
            of = {"model": title, "contender": name if name == LOCK else f"mp_rerank, {name}"}
            report.add(of, "pairs/s", rates[name], better="higher")
            ratios = [ours / theirs for ours, theirs in zip(rates[name], rates[LOCK], strict=True)]
            report.add(of, "times the lock", ratios, better="higher")
            for measured, value in agreement(scores[name], scores[LOCK]).items():
                report.add(of, measured, value, better="")
            if name in pools:
                memory = [worker.uss / 2**20 for worker in pools[name].memory().workers if worker.uss is not None]
                report.add(of, "USS a worker, MiB", memory)
                report.add(of, "start, s", started[name])


def locked(model: str) -> Callable[[Pairs], np.ndarray]:
    """The baseline of speeds and scores: `predict` of one model behind a lock."""
    encoder = CrossEncoder(model, device="cpu")
    lock = threading.Lock()

    def score(pairs: Pairs) -> np.ndarray:
        with lock:
            return encoder.predict(pairs, show_progress_bar=False)

    return score


def take_turns(
    contenders: dict[str, Callable[[Pairs], np.ndarray]], requests: list[Pairs], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[np.ndarray]]]:
    """Each contender's pairs a second in each round, and its scores of each request."""
    pairs = sum(map(len, requests))
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    scores: dict[str, list[np.ndarray]] = {}
    with ThreadPoolExecutor(len(requests)) as agents:
        for turn in range(rounds + 1):  # the first is a warm-up
            for name, score in contenders.items():
                start = time.perf_counter()
                scores[name] = list(agents.map(score, requests))
                if turn:
                    rates[name].append(pairs / (time.perf_counter() - start))
    return rates, scores


def agreement(ours: list[np.ndarray], theirs: list[np.ndarray]) -> dict[str, float]:
    """The largest difference of scores, and how alike they rank, as means over queries."""
    both = list(zip(ours, theirs, strict=True))
    return {
        "largest score difference": float(max(np.abs(a - b).max() for a, b in both)),
        "Kendall's tau": float(np.mean([kendalltau(a, b).statistic for a, b in both])),
        "overlap of the best 10": float(np.mean([len(best(a) & best(b)) / min(TOP, len(a)) for a, b in both])),
    }


def best(scores: np.ndarray) -> set[int]:
    """The positions of the ten best documents."""
    return set(np.argsort(-scores, kind="stable")[:TOP].tolist())
