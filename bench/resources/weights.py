"""`python -m bench weights`: a worker's memory for 1, 2, 4 workers of one model, with its weights shared, wholly shared
(no layer prepacked), and private; and how fast two of them are.

USS is what a worker has to itself; PSS adds its part of what it shares, so that the workers' PSS add up to what all of
them take. Mapped is how much of the weights is the checkpoint's own file. Each row is a pool of its own; memory is read
after it has scored, since pages are mapped when they are first used.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from bench.inputs.models import SHAPES, make_model, make_requests
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelSpec, RerankerPool

MIB = 2**20
WAYS = {
    "shared": {"weights": "shared"},
    "shared, prepack=False": {"weights": "shared", "prepack": False},
    "private": {"weights": "private"},
}


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench weights", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", help="a hub name or a folder (default: random weights of --shape)")
    parser.add_argument("--shape", choices=SHAPES, default="minilm-l6")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help="(default: 1 2 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the race for speed; 0: none (default: 5)")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("weights", "Weights, shared and private", options)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            make_model(folder, SHAPES[options.shape])
        spec = ModelSpec(options.model or folder)
        pairs = make_requests(1, 100, 60)[0]
        methods = [name for name in ("spawn", "forkserver") if name in multiprocessing.get_all_start_methods()]
        for method in methods:
            for workers in options.workers:
                for way in WAYS:
                    weigh(report, spec, method, workers, way, pairs)
        if options.rounds:
            race(report, spec, methods[-1], pairs, options.rounds)
    finish(report, options.out)
    return 0


def weigh(
    report: Report, spec: ModelSpec, start_method: str, workers: int, way: str, pairs: Sequence[tuple[str, str]]
) -> None:
    """What the workers of one pool have, and all of them together."""
    with pool_of(spec, start_method, workers, way) as pool:
        pool.predict([*pairs[:20]] * workers)
        found = pool.memory().workers
    of = {"start method": start_method, "workers": workers, "weights": way}
    report.add(of, "mapped, MiB", [worker.mapped_bytes / MIB for worker in found], better="")
    report.add(of, "USS a worker, MiB", [(worker.uss or 0) / MIB for worker in found])
    report.add(of, "PSS a worker, MiB", [(worker.pss or 0) / MIB for worker in found])
    report.add(of, "PSS of all, MiB", sum(worker.pss or 0 for worker in found) / MIB)


def race(
    report: Report,
    spec: ModelSpec,
    start_method: str,
    pairs: Sequence[tuple[str, str]],
    rounds: int,
    workers: int = 2,
) -> None:
    """Pairs a second of each way, taking turns."""
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        pools = {way: stack.enter_context(pool_of(spec, start_method, workers, way)) for way in WAYS}
        for turn in range(rounds + 1):  # the first is a warm-up
            for way, pool in pools.items():
                begun = time.perf_counter()
                pool.predict(pairs * workers)
                if turn:
                    rates[way].append(workers * len(pairs) / (time.perf_counter() - begun))
    for way, values in rates.items():
        report.add({"two workers, in turns": way}, "pairs/s", values, better="higher")


def pool_of(spec: ModelSpec, start_method: str, workers: int, way: str) -> RerankerPool:
    """A pool whose workers hold their weights that way, one thread each."""
    model = replace(spec, **WAYS[way])
    return RerankerPool(model, devices="cpu", workers=workers, threads_per_worker=1, start_method=start_method)
