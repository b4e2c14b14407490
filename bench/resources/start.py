"""`python -m bench start`: what 1 to 16 workers with a real model take to start, for each start method in turns.

Measured are the time until all are ready; until a worker that was killed is back, and has scored; until something is
scored again after all were killed; the time to close the pool; and the memory of the workers, after each has scored.

16 spawned workers with the built-in model take 6 GB and a minute of two cores. So that a run can be made in parts,
`--add` keeps the rows of the report in `--out` that this run does not measure anew; it must have been made on the same
machine with the same versions.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import psutil

from bench.inputs.models import SHAPES, make_model
from bench.reports.files import add_output, finish, read
from bench.reports.report import Report
from bench.resources.memory import METHODS, MIB
from mp_rerank import ModelSpec, RerankerPool

# What each worker scores before its memory is measured: so many slices, of so many documents.
WAVES, DOCUMENTS = 12, 4
QUERY = "How many people live in Berlin?"
DOCUMENT = "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometres."


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default="builtin",
        help=f"a hub name, a folder, or random weights of a shape: {', '.join(SHAPES)} (default: the built-in model)",
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="numbers of workers")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each start method (default: 3)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", help="of the weights (default: the model's own)")
    parser.add_argument("--add", action="store_true", help="keep the other rows of the report in --out")
    add_output(parser)
    options = parser.parse_args(argv)
    logging.getLogger("mp_rerank").addHandler(logging.NullHandler())  # the killed workers are intended
    report = Report.begin("start", "Starting", options)
    before = earlier(report, options.out) if report.arguments.pop("add") else None
    found: dict[tuple[str, int], dict[str, list[float]]] = {
        (method, workers): defaultdict(list) for method in options.methods for workers in options.workers
    }
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        if model in SHAPES:
            make_model(folder, SHAPES[model])
            model = folder
        for number in range(options.rounds):
            for (method, workers), values in found.items():
                for name, value in measure(method, ModelSpec(model, dtype=options.dtype), workers).items():
                    values[name].append(value)
                print(f"round {number + 1}: {workers} workers, {method}: done", flush=True)
    for (method, workers), row in found.items():
        for name, values in row.items():
            report.add({"start method": method, "workers": workers}, name, values)
    if before is not None:
        add_rows(report, before)
    finish(report, options.out)
    return 0


def measure(method: str, model: ModelSpec, workers: int) -> dict[str, float]:
    """Start a pool, kill workers, wait for the next, and close it; what was measured, by name."""
    begun = time.perf_counter()
    patient = workers + 3  # until the pool has noticed that all were killed, the request may go to one after the other
    with RerankerPool(model, devices="cpu", workers=workers, start_method=method, max_attempts=patient) as pool:
        started = time.perf_counter()
        for wave in range(WAVES):  # every worker is idle, and gets its part
            pool.rerank(QUERY, [f"{wave}.{i}: {DOCUMENT}" for i in range(DOCUMENTS * workers)])
        memory = pool.memory()
        processes = sum(child.memory_full_info().pss for child in psutil.Process().children(recursive=True))
        pid = pool.workers()[0].pid
        assert pid is not None
        killed = time.perf_counter()
        psutil.Process(pid).kill()
        while pool.workers()[0].generation == 1 or pool.workers()[0].state != "ready":
            time.sleep(0.002)
        back = time.perf_counter()
        pool.rerank(QUERY, [DOCUMENT])  # of workers with nothing to do the first gets it: the new one
        first = time.perf_counter()
        for worker in pool.workers():
            psutil.Process(worker.pid).kill()
        killed_all = time.perf_counter()
        pool.rerank(QUERY, [DOCUMENT])
        scored = time.perf_counter()
        while any(worker.state != "ready" for worker in pool.workers()):
            time.sleep(0.005)
        closing = time.perf_counter()
    closed = time.perf_counter()
    return {
        "ready, s": started - begun,
        "back after SIGKILL, s": back - killed,
        "back with its first score, s": first - killed,
        "first score after SIGKILL of all, s": scored - killed_all,
        "close, s": closed - closing,
        "USS a worker, MiB": statistics.mean(worker.uss or 0 for worker in memory.workers) / MIB,
        "PSS a worker, MiB": statistics.mean(worker.pss or 0 for worker in memory.workers) / MIB,
        "PSS of all workers and what they are forked from, MiB": processes / MIB,
    }


def earlier(report: Report, out: Path) -> Report | None:
    """The report in ``out`` that ``report`` is to go on with, if there is one; exits where it is of something else."""
    path = out / f"{report.command}.json"
    if not path.is_file():
        return None
    before = read(path)
    for what, here, there in (
        ("machine", _lasting(report.machine), _lasting(before.machine)),
        ("versions", report.versions, before.versions),
        *((name, report.arguments[name], before.arguments.get(name)) for name in ("model", "dtype")),
    ):
        if here != there:
            raise SystemExit(f"--add: {path} has another {what}: {there}, and here: {here}")
    return before


def _lasting(machine: dict[str, object]) -> dict[str, object]:
    return {name: value for name, value in machine.items() if name not in ("date", "load_at_start")}


def add_rows(report: Report, before: Report) -> None:
    """Add those rows of ``before`` to ``report`` that are of another start method or number of workers."""
    new = [row.of for row in report.rows]
    rows = [*report.rows, *(row for row in before.rows if row.of not in new)]
    report.rows = sorted(rows, key=lambda row: (METHODS.index(row.of["start method"]), row.of["workers"]))
    for label, argument in (("start method", "methods"), ("workers", "workers")):
        report.arguments[argument] = list(dict.fromkeys(row.of[label] for row in report.rows))
    if before.arguments["rounds"] != report.arguments["rounds"]:
        report.arguments["rounds"] = None  # each row has its own
