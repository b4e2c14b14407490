"""`python -m bench load`: the time to import the libraries, to construct a model, and to predict, first and later.

Each step is timed in a new interpreter, as wall time and CPU time. It is timed twice: with the files of the packages
and of the model in the system's file cache, and after the system was asked to drop them. (`posix_fadvise` drops no file
that another process has mapped, so nothing else should be using torch.) Then the same steps are timed with a pool of
one worker, whose parent imports none of the libraries.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from bench import ROOT
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelSpec, RerankerPool

PACKAGES = ("numpy", "scipy", "sklearn", "safetensors", "tokenizers", "torch", "transformers", "sentence_transformers")
QUERY = "How many people live in Berlin?"
DOCUMENTS = ["Berlin had a population of 3,520,031 registered inhabitants."] * 10
CACHED, DROPPED = "cached", "dropped from the cache"


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="builtin", help="a hub name or a folder (default: the built-in model)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cached-only", action="store_true", help="drop nothing from the system's cache")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    add_output(parser)
    options = parser.parse_args(argv)
    path = ModelSpec(options.model).path
    if options.child:
        print(json.dumps(steps_of_library(path)))
        return 0
    report = Report.begin("load", "Loading", options)
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(options.rounds + 1):  # the first fills the cache
        for files in [CACHED] if options.cached_only else [CACHED, DROPPED]:
            for measure in (lambda: run_child(options.model), lambda: steps_of_pool(path)):
                if files == DROPPED:
                    drop(path)
                for step, costs in measure().items():
                    if turn:
                        found.setdefault((files, step), []).append(costs)
        print(f"round {turn} of {options.rounds}", flush=True)
    for (files, step), costs in found.items():
        of = {"files": files, "step": step}
        report.add(of, "s", [wall for wall, _ in costs])
        report.add(of, "CPU, s", [cpu for _, cpu in costs])
    finish(report, options.out)
    return 0


def run_child(model: str) -> dict[str, tuple[float, float]]:
    """Time the library's steps in a new interpreter."""
    command = [sys.executable, "-m", "bench", "load", "--child", "--model", model]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "pass"], check=True)
    bare = time.perf_counter() - start
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return {"a bare interpreter": (bare, bare), **json.loads(done.stdout)}


def steps_of_library(path: str) -> dict[str, tuple[float, float]]:
    """Time the steps of a process that uses ``CrossEncoder``, in order: (wall, CPU) seconds of each."""
    steps: dict[str, tuple[float, float]] = {}
    for package in ("torch", "transformers", "sentence_transformers"):
        steps[f"import {package}"] = timed(lambda package=package: __import__(package))
    from sentence_transformers import CrossEncoder

    pairs = [(QUERY, document) for document in DOCUMENTS]
    models = []
    steps["CrossEncoder(...)"] = timed(lambda: models.append(CrossEncoder(path, device="cpu")))
    steps["CrossEncoder(...) once more"] = timed(lambda: models.append(CrossEncoder(path, device="cpu")))
    steps["predict 10 pairs, first"] = timed(lambda: models[0].predict(pairs, show_progress_bar=False))
    later = [timed(lambda: models[0].predict(pairs, show_progress_bar=False)) for _ in range(9)]
    steps["predict 10 pairs, later"] = sorted(later)[4]
    return steps


def steps_of_pool(path: str) -> dict[str, tuple[float, float]]:
    """Time the same steps with a pool of one worker; the CPU seconds are the parent's."""
    command = [sys.executable, "-c", "import mp_rerank"]
    steps = {"import mp_rerank, interpreter included": timed(lambda: subprocess.run(command, cwd=ROOT, check=True))}
    pool = RerankerPool(path, devices="cpu", workers=1)
    try:
        steps["mp_rerank: start of 1 worker"] = timed(pool.start)
        steps["mp_rerank: request of 10, first"] = timed(lambda: pool.rerank(QUERY, DOCUMENTS))
        later = [timed(lambda: pool.rerank(QUERY, DOCUMENTS)) for _ in range(9)]
        steps["mp_rerank: request of 10, later"] = sorted(later)[4]
    finally:
        pool.close()
    return steps


def timed(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds of ``call``; CPU seconds of this process without its children."""
    start, burnt = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - burnt


def drop(path: str) -> None:
    """Ask the system to drop the files of the packages and of the model from its cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    folders = [Path(path)]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            folders.append(Path(spec.origin).parent)
    os.sync()  # only what is written to disk can be dropped
    for folder in folders:
        for file in folder.rglob("*"):
            with suppress(OSError):
                if file.is_file():
                    descriptor = os.open(file, os.O_RDONLY)
                    try:
                        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                    finally:
                        os.close(descriptor)
