"""`python -m bench start`: the time to start workers, to replace a killed one, to score again after all were killed,
and to close the pool; and the workers' memory; for each start method in turns.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence

import psutil

from bench.inputs.models import SHAPES, make_model
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelSpec, RerankerPool

METHODS = ("spawn", "forkserver", "fork-model")
BATCHES = 12  # a worker scores before its memory is measured
PAIR = ("How many people live in Berlin?", ["Berlin had a population of 3,520,031 registered inhabitants."])


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m bench start", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model",
        default="builtin",
        help=f"a hub name, a folder, or random weights of a shape: {', '.join(SHAPES)} (default: the built-in model)",
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each start method (default: 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", help="of the weights (default: the model's own)")
    add_output(parser)
    options = parser.parse_args(argv)
    logging.getLogger("mp_rerank").addHandler(logging.NullHandler())  # the killed workers are intended
    report = Report.begin("start", "Starting", options)
    found: dict[str, dict[str, list[float]]] = {method: defaultdict(list) for method in options.methods}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model in SHAPES:
            make_model(folder, SHAPES[model])
            model = folder
        for _ in range(options.rounds):
            for method in options.methods:
                spec = ModelSpec(model, dtype=options.dtype)
                for name, value in measure(method, spec, options.workers).items():
                    found[method][name].append(value)
    for method, row in found.items():
        for name, values in row.items():
            report.add({"start method": method}, name, values)
    finish(report, options.out)
    return 0


def measure(method: str, model: ModelSpec, workers: int) -> dict[str, float]:
    """Start a pool, kill a worker, wait for the next, and close it; what was measured, by name."""
    begun = time.perf_counter()
    with RerankerPool(model, devices="cpu", workers=workers, start_method=method) as pool:
        started = time.perf_counter()
        pool.rerank(*PAIR)
        for _ in range(BATCHES * workers):
            pool.rerank(*PAIR)
        memory = pool.memory()
        children = psutil.Process().children(recursive=True)
        forked = sum(child.memory_full_info().pss for child in children)
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        killed = time.perf_counter()
        while pool.workers()[0].generation == 1 or pool.workers()[0].state != "ready":
            time.sleep(0.005)
        back = time.perf_counter()
        pool.rerank(*PAIR)
        for worker in pool.workers():
            psutil.Process(worker.pid).kill()
        killed_all = time.perf_counter()
        pool.rerank(*PAIR)
        scored = time.perf_counter()
        while any(worker.state != "ready" for worker in pool.workers()):
            time.sleep(0.005)
        closing = time.perf_counter()
    closed = time.perf_counter()
    return {
        f"start of {workers}, s": started - begun,
        "back after SIGKILL, s": back - killed,
        "first score after SIGKILL of all, s": scored - killed_all,
        "close, s": closed - closing,
        "USS a worker, MiB": statistics.mean(worker.uss for worker in memory.workers) / 2**20,
        "PSS a worker, MiB": statistics.mean(worker.pss for worker in memory.workers) / 2**20,
        "PSS of all workers and what they are forked from, MiB": forked / 2**20,
    }
