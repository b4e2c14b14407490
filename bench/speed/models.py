"""`python -m bench models`: the architectures people choose, each beside one locked model, in float32 and in 16 bits.

A pool and the locked model take turns, round after round, so that other work on the machine slows both alike; the
ratio is of each round's two rates. Each agent has one request pending at a time; small shapes have so many a round that
its beginning and end, when some cores have nothing to compute, hardly count. One dtype at a time, since the larger
shapes take gigabytes. Weights are random: speed does not depend on them.

The share says how much of the cores' possible rate the linear layers of the pool reach: its rate times the operations
of their products, for all tokens of a pair, beside that of cores that do nothing but multiply matrices of these shapes
with torch. It can be more than 100 %: where pairs have a beginning in common, which is computed once, and in float32 on
CPUs with AMX, where this package has products of its own.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch

from bench.inputs.architectures import ARCHITECTURES, make_architecture
from bench.inputs.models import Pairs, make_requests
from bench.reports.files import add_output, finish, save
from bench.reports.report import Report
from bench.speed.contenders import BASELINE, Setting, load_model, locked, pool

TOKENS = 1024
DTYPES = ("float32", "bfloat16")
#: requests of an agent a round: in short rounds the end counts, when one worker has nothing to compute
REQUESTS = {
    "minilm-l6": 24,
    "ettin-17m": 32,
    "modernbert-base": 4,
    "deberta-v3-base": 4,
    "xlm-r-large": 2,
    "qwen3-0.6b": 1,
}


def main(argv: Sequence[str]) -> int:
    """Measure each shape and write."""
    parser = argparse.ArgumentParser(prog="python -m bench models", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="SHAPE")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), metavar="DTYPE")
    parser.add_argument("--agents", type=int, default=4, help="threads, each with a request (default 4)")
    parser.add_argument("--requests", type=int, help=f"requests of an agent a round (default {REQUESTS})")
    parser.add_argument("--documents", type=int, default=16, help="documents a request (default 16)")
    parser.add_argument("--words", type=int, default=60, help="mean words of a document (default 60)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds each takes (default 3)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a CPU)")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("models", "Models", options)
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            setting = Setting(make_architecture(shape, folder), options.workers, options.agents)
            count = options.agents * (options.requests or REQUESTS[shape])
            requests = make_requests(count, options.documents, options.words)
            for dtype in options.dtypes:
                compare(report, shape, dtype, setting, requests, options.rounds)
                save(report, options.out)
                print(f"{shape}, {dtype}: done", file=sys.stderr, flush=True)
    finish(report, options.out)
    return 0


def compare(report: Report, shape: str, dtype: str, setting: Setting, requests: list[Pairs], rounds: int) -> None:
    """Measure a pool in ``dtype`` and the locked model, in turns."""
    pairs = sum(map(len, requests))
    tokens, products = arithmetic(setting, requests)
    possible = sum(_on_all_cores(setting.workers, products, dtype))
    rates: dict[str, list[float]] = {BASELINE: [], "mp_rerank": []}
    scores = {}
    with locked(setting) as theirs, pool(setting, dtype) as ours:
        for run in (theirs, ours):
            run(requests[: setting.agents])  # to warm up
        for _ in range(rounds):
            for name, run in ((BASELINE, theirs), ("mp_rerank", ours)):
                start = time.perf_counter()
                scores[name] = np.concatenate(run(requests))
                rates[name].append(pairs / (time.perf_counter() - start))
    times = [a / b for a, b in zip(rates["mp_rerank"], rates[BASELINE], strict=True)]
    operations = tokens * sum(2 * rows * columns * count for (rows, columns), count in products.items())
    of = {"model": shape, "contender": f"mp_rerank, {dtype}"}
    report.add(of, "times the lock", times, better="higher")
    report.add(of, "pairs/s", rates["mp_rerank"], better="higher")
    report.add(of, "pairs/s of the lock", rates[BASELINE], better="")
    report.add(of, "share, %", [100 * rate * operations / possible for rate in rates["mp_rerank"]], better="higher")
    report.add(of, "largest score difference", float(np.abs(scores["mp_rerank"] - scores[BASELINE]).max()), better="")


def arithmetic(setting: Setting, requests: list[Pairs]) -> tuple[float, dict[tuple[int, int], int]]:
    """The tokens of a pair, and how many linear layers of each shape see every one of them."""
    model = load_model(setting)
    features = model.preprocess([pair for request in requests for pair in request])
    layers = Counter(
        (part.in_features, part.out_features)
        for part in model.model.base_model.modules()
        if isinstance(part, torch.nn.Linear) and part.in_features >= model.model.config.hidden_size
    )
    return float(features["attention_mask"].sum() / len(features["attention_mask"])), dict(layers)


def _on_all_cores(workers: int, products: dict[tuple[int, int], int], dtype: str) -> list[float]:
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        return list(executor.map(multiply, [products] * workers, [dtype] * workers))


def multiply(products: dict[tuple[int, int], int], dtype: str, trials: int = 8) -> float:
    """The operations a second of one core on products of these shapes, in the faster of torch's two ways."""
    torch.set_num_threads(1)
    seconds = 0.0
    with torch.inference_mode():
        for (rows, columns), count in products.items():
            layer = torch.nn.Linear(rows, columns, dtype=getattr(torch, dtype))
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), TOKENS)
            input = torch.randn(TOKENS, rows, dtype=layer.weight.dtype)
            prepacked = partial(torch.ops.mkldnn._linear_pointwise, input, packed, layer.bias, "none", [], "")
            seconds += count * min(_seconds(way) for way in [prepacked, partial(layer, input)] * trials)
    return sum(2 * TOKENS * rows * columns * count for (rows, columns), count in products.items()) / seconds


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
