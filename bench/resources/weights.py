"""`python -m bench weights`: memory and speed of workers whose weights are shared, shared with no layer prepacked, or
private.

USS is memory that a worker shares with no other process. PSS adds its part of the shared memory, so that the sum of all
workers' PSS is the memory that they take together. "Mapped" is the size of the weights that are used from the
checkpoint's file. Each row comes from a pool of its own. Memory is read after the pool has scored, since a page of the
file takes memory once it is used.
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
SETTINGS = {
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
                for setting in SETTINGS:
                    weigh(report, spec, method, workers, setting, pairs)
        if options.rounds:
            race(report, spec, methods[-1], pairs, options.rounds)
    finish(report, options.out)
    return 0


def weigh(
    report: Report, spec: ModelSpec, start_method: str, workers: int, setting: str, pairs: Sequence[tuple[str, str]]
) -> None:
    """Add the memory of each worker of one pool, and of all together."""
    with pool_of(spec, start_method, workers, setting) as pool:
        pool.predict([*pairs[:20]] * workers)
        found = pool.memory().workers
    of = {"start method": start_method, "workers": workers, "weights": setting}
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
    """Measure the pairs a second of workers with each setting, in turns."""
    rates: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    with ExitStack() as stack:
        pools = {setting: stack.enter_context(pool_of(spec, start_method, workers, setting)) for setting in SETTINGS}
        for turn in range(rounds + 1):  # the first is a warm-up
            for setting, pool in pools.items():
                begun = time.perf_counter()
                pool.predict(pairs * workers)
                if turn:
                    rates[setting].append(workers * len(pairs) / (time.perf_counter() - begun))
    for setting, values in rates.items():
        report.add({"two workers, in turns": setting}, "pairs/s", values, better="higher")


def pool_of(spec: ModelSpec, start_method: str, workers: int, setting: str) -> RerankerPool:
    """A pool with one of ``SETTINGS``, one thread a worker."""
    model = replace(spec, **SETTINGS[setting])
    return RerankerPool(model, devices="cpu", workers=workers, threads_per_worker=1, start_method=start_method)
