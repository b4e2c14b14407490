"""`python -m bench scale`: what more workers and more pending requests cost the dispatcher. Needs no torch.

*Slots*: 1 to 64 workers, whose model sleeps for a fixed time a slice. Measured are the share of the workers' time in
which they are in use, and the parent's CPU time for each slice.

*One request*: its documents are scored by workers whose model takes a fixed time a token. Measured is how long it
takes, beside what it would if they were divided exactly and nothing were sent.

*Pending*: 1 to 100,000 requests wait while the workers are blocked. Measured is the time of one more `submit`, and,
once the workers go on, the time of each request until its result is back.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psutil

from bench.inputs import fakes
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import ModelSpec, RerankerPool
from mp_rerank._pairs import estimate_pair, estimate_text
from mp_rerank._planning.plan import CPU_BATCH_TOKENS_FAST

PENDING_A_SLOT = 6  # of them two are with the worker
SECONDS_A_TOKEN = 1e-4


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slots", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--pending", type=int, nargs="*", default=[1, 10, 100, 1_000, 10_000, 100_000])
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 8], help="of one request (default 2 and 8)")
    parser.add_argument("--documents", type=int, nargs="*", default=[10, 20, 30, 50, 100, 200], help="of one request")
    parser.add_argument("--milliseconds", type=float, default=50.0, help="that a slice takes (default 50)")
    parser.add_argument("--slices", type=int, default=60, help="slices a slot and round (default 60)")
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("scale", "Scale", options)
    # The largest number first: later runs reuse memory that earlier ones have freed, and would seem to need none.
    for count in sorted(options.slots, reverse=True):
        slots(report, count, options.milliseconds / 1000, options.slices, options.rounds)
    report.rows.sort(key=lambda row: row.of["slots"])
    for count in options.workers:
        for documents in options.documents:
            one_request(report, count, documents, options.rounds)
    for count in options.pending:
        pending(report, count, options.rounds)
    finish(report, options.out)
    return 0


def slots(report: Report, count: int, seconds: float, slices: int, rounds: int) -> None:
    """Give ``count`` workers all the slices that they can take, and measure the share of time in which they work.

    Every request is one document and every document a slice, so that the dispatcher pays for each slice in full: its
    request, its messages, its futures.
    """
    parent = psutil.Process()
    before = footprint(parent)
    sleeping = ModelSpec(str(seconds), loader=fakes.SLEEPING)
    with RerankerPool(
        sleeping, devices="cpu", workers=count, threads_per_worker=1, slice_tokens=1, coalesce=False
    ) as pool:
        after = footprint(parent)
        workers = [psutil.Process(info.pid) for info in pool.workers()]
        kept_busy(pool, count, 3)
        efficiency, own, theirs = [], [], []
        for _ in range(rounds):
            before_round = time.process_time(), sum(map(cpu_seconds, workers))
            wall = kept_busy(pool, count, slices)
            efficiency.append(100 * slices * seconds / wall)
            own.append(1e6 * (time.process_time() - before_round[0]) / (count * slices))
            theirs.append(1e6 * (sum(map(cpu_seconds, workers)) - before_round[1]) / (count * slices))
    of = {"slots": count}
    report.add(of, "efficiency, %", efficiency, better="higher")
    report.add(of, "CPU of the parent, µs a slice", own)
    report.add(of, "CPU of a worker, µs a slice", theirs)
    for measure in ("threads", "open files"):
        report.add(of, f"{measure} of the parent a slot", (after[measure] - before[measure]) / count)
    if len(report.rows) == 5:
        report.add(of, "memory of the parent a slot, KiB", (after["bytes"] - before["bytes"]) / 1024 / count)
    print(f"{count} slots: {statistics.median(efficiency):.1f} %", flush=True)


def kept_busy(pool: RerankerPool, count: int, slices: int, document: str = "a document") -> float:
    """The seconds of ``count`` workers for ``slices`` slices each, with a few requests a worker always pending."""
    start = time.perf_counter()
    waiting: deque[Future[Any]] = deque()
    for _ in range(count * slices):
        if len(waiting) == PENDING_A_SLOT * count:
            waiting.popleft().result()  # about the first to be done: all take equally long
        waiting.append(pool.submit_pairs([("a query", document)]))
    while waiting:
        waiting.popleft().result()
    return time.perf_counter() - start


def one_request(report: Report, workers: int, documents: int, rounds: int) -> None:
    """Measure a request of so many documents of about 60 words while nothing else waits."""
    chance = random.Random(0)
    query = "how many words has this query"
    times = []
    paced = ModelSpec(str(SECONDS_A_TOKEN), loader=fakes.PACED)
    with RerankerPool(
        paced, devices="cpu", workers=workers, threads_per_worker=1, batch_tokens=CPU_BATCH_TOKENS_FAST
    ) as pool:
        pool.start()
        for number in range(rounds + 1):
            texts = [f"{number} {i} " + "words " * max(3, round(chance.gauss(60, 20))) for i in range(documents)]
            exact = sum(estimate_pair(estimate_text(query), text, None) for text in texts) * SECONDS_A_TOKEN / workers
            start = time.perf_counter()
            pool.submit(query, texts).result()
            times.append((time.perf_counter() - start) / exact)
    report.add({"workers": workers, "documents of one request": documents}, "times an exact division", times[1:])
    print(f"{workers} workers, {documents} documents: {times[-1]:.2f}", flush=True)


def footprint(process: psutil.Process) -> dict[str, float]:
    """A process's threads, open files and memory. Memory of files is left out: workers share that of the libraries."""
    memory = process.memory_info()
    return {
        "threads": threading.active_count(),
        "open files": process.num_fds() if hasattr(process, "num_fds") else process.num_handles(),
        "bytes": memory.rss - getattr(memory, "shared", 0),
    }


def cpu_seconds(process: psutil.Process) -> float:
    """The CPU time that a process has used."""
    times = process.cpu_times()
    return times.user + times.system


def pending(report: Report, count: int, rounds: int, probe: int = 200) -> None:
    """Measure ``probe`` more submits behind ``count`` pending requests, and the first results once workers go on."""
    submits, dispatches, sizes = [], [], []
    parent = psutil.Process()
    for _ in range(rounds if count < 100_000 else 1):
        with tempfile.TemporaryDirectory() as folder:
            gate = Path(folder, "gate")
            gated = ModelSpec(str(gate), loader=fakes.GATED)
            with RerankerPool(gated, devices="cpu", workers=2, threads_per_worker=1) as pool:
                gate.touch()
                before = parent.memory_full_info().uss
                waiting = deque(pool.submit("a query", [f"document {i}"]) for i in range(count))
                pool.stats()  # returns after all earlier submits have been handled
                sizes.append((parent.memory_full_info().uss - before) / 1024 / count)
                times = []
                for i in range(probe):
                    start = time.perf_counter()
                    waiting.append(pool.submit("a query", [f"document {i}"]))
                    times.append(time.perf_counter() - start)
                submits.append(1e6 * statistics.median(times))
                pool.stats()
                first = min(len(waiting), 5_000)
                done = pool.stats().completed
                start = time.perf_counter()
                os.unlink(gate)
                for _ in range(first):
                    waiting.popleft().result()
                seconds = time.perf_counter() - start
                dispatches.append(1e6 * seconds / max(first, pool.stats().completed - done))
                gate.touch()
                pool.close(drain=False)
    of = {"pending requests": count}
    report.add(of, "one more submit, µs", submits)
    report.add(of, "dispatch and back, µs a request", dispatches)
    if count >= 10_000:
        report.add(of, "memory, KiB a request", sizes)
    print(f"{count} pending: {submits[-1]:.0f} µs to submit, {dispatches[-1]:.0f} to dispatch", flush=True)
