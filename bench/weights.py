"""`python -m bench weights`: a worker's memory for 1, 2, 4 workers of one model, with its weights shared, wholly shared
(no layer prepacked), and private; and how fast two of them are.

USS is what a worker has to itself; PSS adds its part of what it shares, so that the workers' PSS add up to what all of
them take. Mapped is how much of the weights is the checkpoint's own file. Each row is a pool of its own; memory is read
after it has scored, since pages are mapped when they are first used.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from bench.throughput import SHAPES, make_model, make_requests
from mp_rerank import ModelSpec, RerankerPool

MIB = 2**20
WAYS = {
    "shared": {"weights": "shared"},
    "shared, prepack=False": {"weights": "shared", "prepack": False},
    "private": {"weights": "private"},
}


def main(argv: Sequence[str]) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench weights", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", help="a hub name or a folder (default: random weights of --shape)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the race for speed; 0: none (default: 5)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_model(folder, SHAPES[options.shape])
        spec = ModelSpec(options.model or folder)
        pairs = make_requests(1, 100, 60)[0]
        methods = [name for name in ("spawn", "forkserver") if name in multiprocessing.get_all_start_methods()]
        rows = [
            {"start_method": method, "workers": workers, "way": way, **memory(spec, method, workers, way, pairs)}
            for method in methods
            for workers in options.workers
            for way in WAYS
        ]
        speed = race(spec, methods[-1], pairs, options.rounds) if options.rounds else {}
    if options.json:
        print(json.dumps({"memory": rows, "pairs_per_second": speed}, indent=2))
        return 0
    print("| start method | workers | weights | mapped, MiB | USS a worker, MiB | PSS a worker, MiB | all, MiB |")
    print("|---|---:|---|---:|---:|---:|---:|")
    for row in rows:
        figures = " | ".join(f"{row[name]:.0f}" for name in ("mapped", "uss", "pss", "all"))
        print(f"| {row['start_method']} | {row['workers']} | {row['way']} | {figures} |")
    if speed:
        print(f"\nTwo workers, in turns, pairs a second: {', '.join(f'{way} {v:.0f}' for way, v in speed.items())}")
    return 0


def memory(
    spec: ModelSpec, start_method: str, workers: int, way: str, pairs: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Means over the workers of one pool, in MiB, and their sum."""
    with pool_of(spec, start_method, workers, way) as pool:
        pool.predict([*pairs[:20]] * workers)
        found = pool.memory().workers
    return {
        "mapped": statistics.mean(worker.mapped_bytes for worker in found) / MIB,
        "uss": statistics.mean(worker.uss or 0 for worker in found) / MIB,
        "pss": statistics.mean(worker.pss or 0 for worker in found) / MIB,
        "all": sum(worker.pss or 0 for worker in found) / MIB,
    }


def race(
    spec: ModelSpec, start_method: str, pairs: Sequence[tuple[str, str]], rounds: int, workers: int = 2
) -> dict[str, float]:
    """Median pairs a second of each way, taking turns."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        pools = {way: stack.enter_context(pool_of(spec, start_method, workers, way)) for way in WAYS}
        for turn in range(rounds + 1):  # the first is a warm-up
            for way, pool in pools.items():
                begun = time.perf_counter()
                pool.predict(pairs * workers)
                if turn:
                    rates[way].append(workers * len(pairs) / (time.perf_counter() - begun))
    return {way: statistics.median(values) for way, values in rates.items()}


def pool_of(spec: ModelSpec, start_method: str, workers: int, way: str) -> RerankerPool:
    """A pool whose workers hold their weights that way, one thread each."""
    model = replace(spec, **WAYS[way])
    return RerankerPool(model, devices="cpu", workers=workers, threads_per_worker=1, start_method=start_method)
