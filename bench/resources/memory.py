"""`python -m bench memory`: the memory of a worker in each phase, and of the parent.

    bare          with an empty model: Python, numpy and this package
    imports       after the import of all that a real model needs
    loaded        with the model
    first batch   after its first batches
    after N       after N requests (`--requests`) of one document; only with the first number of `--workers`

Measured for each number of workers, start method and backend. The report has the memory of the parent too, and that of
all processes together, with the fork server or the template. RSS counts shared memory in full, USS not at all, and PSS
in parts. A single worker's USS is larger than that of several, since it has no other to share the libraries' memory
with.
"""

from __future__ import annotations

import argparse
import random
from collections import deque
from collections.abc import Sequence

import psutil

from bench.inputs import fakes
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelSpec, RerankerPool

MIB = 2**20
METHODS = ("spawn", "forkserver", "fork-model")
BARE = ModelSpec("bare", loader=fakes.EMPTY)
IMPORTS = ModelSpec("imports", loader=fakes.IMPORTS)
QUERY = "How many people live in Berlin?"
DOCUMENT = "Berlin had a population of 3,520,031 registered inhabitants in an area of 891.82 square kilometres."


def backends(model: str) -> dict[str, ModelSpec]:
    """The backends to run ``model`` with; another one is another line."""
    return {"torch": ModelSpec(model)}


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="a hub name or a folder (default: the built-in model)")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 1, 4], help="numbers of workers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--requests", type=int, default=10_000, help="of the last phase; 0: none (default 10,000)")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("memory", "Memory", options)
    for position, workers in enumerate(options.workers):
        for method in options.methods:
            for phase, spec in (("bare", BARE), ("imports", IMPORTS)):
                with start(spec, method, workers) as pool:
                    weigh(report, pool, {"backend": "none", "start method": method, "workers": workers}, phase)
            for backend, spec in backends(options.model).items():
                of = {"backend": backend, "start method": method, "workers": workers}
                with start(spec, method, workers) as pool:
                    weigh(report, pool, of, "loaded")
                    work(pool, 40 * workers, 2 * workers)
                    weigh(report, pool, of, "first batch")
                    if options.requests and position == 0:
                        work(pool, options.requests, 16)
                        weigh(report, pool, of, f"after {options.requests}")
            print(f"{workers} workers, {method}: done", flush=True)
    finish(report, options.out)
    return 0


def start(spec: ModelSpec, method: str, workers: int) -> RerankerPool:
    """A pool to be measured."""
    return RerankerPool(spec, devices="cpu", workers=workers, threads_per_worker=1, start_method=method)


def work(pool: RerankerPool, requests: int, pending: int) -> None:
    """Submit different requests of one document of 1 to 120 words each, with ``pending`` of them at a time."""
    chance = random.Random(0)
    words = (f"{DOCUMENT} " * 8).split()
    waiting = deque()
    for i in range(requests):
        if len(waiting) == pending:
            waiting.popleft().result()
        waiting.append(pool.submit(QUERY, [f"{i}: {' '.join(words[: chance.randint(0, 119)])}"]))
    while waiting:
        waiting.popleft().result()


def weigh(report: Report, pool: RerankerPool, of: dict[str, object], phase: str) -> None:
    """Add a row for each kind of memory: of the workers, with one value for each, and of the parent."""
    found = pool.memory()
    of = {"phase": phase, **of}
    for kind in ("uss", "pss", "rss"):
        values = [value / MIB for worker in found.workers if (value := getattr(worker, kind)) is not None]
        if values:
            report.add(of, f"{kind.upper()} a worker, MiB", values)
    if found.parent.uss is not None:
        report.add(of, "USS of the parent, MiB", found.parent.uss / MIB)
    if found.templates and found.templates[0].uss is not None:
        report.add(of, "USS of the template, MiB", sum(template.uss or 0 for template in found.templates) / MIB)
    if found.parent.pss is not None:  # with the fork server
        children = psutil.Process().children(recursive=True)
        everything = found.parent.pss + sum(child.memory_full_info().pss for child in children)
        report.add(of, "PSS of all processes, MiB", everything / MIB)
