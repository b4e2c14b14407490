"""`python -m bench start`: the time to start workers, to replace a killed one and to close the pool, and a worker's
memory, for both start methods in turns.
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
from mp_rerank import RerankerPool

METHODS = ("spawn", "forkserver")
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
    add_output(parser)
    options = parser.parse_args(argv)
    logging.getLogger("mp_rerank").addHandler(logging.NullHandler())  # the killed workers are intended
    report = Report.begin("start", "Starting", options)
    found: dict[str, dict[str, list[float]]] = {method: defaultdict(list) for method in METHODS}
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model in SHAPES:
            make_model(folder, SHAPES[model])
            model = folder
        for _ in range(options.rounds):
            for method in METHODS:
                for name, value in measure(method, model, options.workers).items():
                    found[method][name].append(value)
    for method, row in found.items():
        for name, values in row.items():
            report.add({"start method": method}, name, values)
    finish(report, options.out)
    return 0


def measure(method: str, model: str, workers: int) -> dict[str, float]:
    """Start a pool, kill a worker, wait for the next, and close it; what was measured, by name."""
    begun = time.perf_counter()
    with RerankerPool(model, devices="cpu", workers=workers, start_method=method) as pool:
        started = time.perf_counter()
        pool.rerank(*PAIR)
        memory = pool.memory().workers
        pid = pool.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        killed = time.perf_counter()
        while pool.workers()[0].generation == 1 or pool.workers()[0].state != "ready":
            time.sleep(0.005)
        back = time.perf_counter()
        pool.rerank(*PAIR)
        closing = time.perf_counter()
    closed = time.perf_counter()
    return {
        f"start of {workers}, s": started - begun,
        "back after SIGKILL, s": back - killed,
        "close, s": closed - closing,
        "USS a worker, MiB": statistics.mean(worker.uss for worker in memory) / 2**20,
        "PSS a worker, MiB": statistics.mean(worker.pss for worker in memory) / 2**20,
    }
