"""`python -m bench growth`: 1 to 64 workers of a model that does nothing, for each start method.

Measured are the time until all are ready, the memory of the parent, of what the workers are forked from, and of a
worker, and the time until a killed worker is back. The model needs no torch, and so neither do spawned workers nor the
template; the fork server imports it anyway.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence

import psutil

from bench.inputs import fakes
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from bench.resources.memory import METHODS, MIB
from mp_rerank import ModelSpec, RerankerPool

MODEL = ModelSpec("empty", loader=fakes.EMPTY)


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of workers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser)
    options = parser.parse_args(argv)
    logging.getLogger("mp_rerank").addHandler(logging.NullHandler())  # the killed workers are intended
    report = Report.begin("growth", "Growth", options)
    for workers in options.workers:
        for method in options.methods:
            rounds = [measure(method, workers) for _ in range(options.rounds)]
            for name in rounds[0]:
                report.add({"start method": method, "workers": workers}, name, [found[name] for found in rounds])
            print(f"{workers} workers, {method}: done", flush=True)
    finish(report, options.out)
    return 0


def measure(method: str, workers: int) -> dict[str, float]:
    """Start a pool and look at its processes; what was measured, by name."""
    begun = time.perf_counter()
    with RerankerPool(MODEL, devices="cpu", workers=workers, threads_per_worker=1, start_method=method) as pool:
        ready = time.perf_counter()
        found = pool.memory()
        pids = [worker.pid for worker in pool.workers()]
        above = psutil.Process(pids[0]).parent()
        forked_by = 0 if above is None or above == psutil.Process() else above.memory_full_info().uss
        psutil.Process(pids[0]).kill()
        killed = time.perf_counter()
        while pool.workers()[0].generation == 1 or pool.workers()[0].state != "ready":
            time.sleep(0.002)
        back = time.perf_counter()
    return {
        "ready, s": ready - begun,
        "USS of the parent, MiB": (found.parent.uss or 0) / MIB,
        "USS of server or template, MiB": forked_by / MIB,
        "USS a worker, MiB": statistics.mean(worker.uss or 0 for worker in found.workers) / MIB,
        "back after SIGKILL, s": back - killed,
    }
