"""`python -m bench latency`: how long one request takes, by itself and in company.

Three tables. *Through the machinery*: from `submit` to an empty model and back, beside a bare `ProcessPoolExecutor(1)`
that is sent the same texts, in turns; and how many pairs a second pass when agents keep it busy. *One large request*
of 100 documents on an idle pool, beside `CrossEncoder.predict` on all cores, in turns. *Small ones among large ones*:
requests of 10 documents while two agents submit one of 100 after the other, to the pool and to one model with a lock.

The first needs no torch; `--no-model` ends there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

from bench.inputs import fakes
from bench.reports.files import add_output, finish
from bench.reports.report import Report, quantile
from mp_rerank import ModelSpec, RerankerPool

EMPTY = ModelSpec("empty", loader=fakes.EMPTY)
QUANTILES = {"p50, ms": 0.5, "p95, ms": 0.95, "p99, ms": 0.99}
OURS, BARE = "mp_rerank", "ProcessPoolExecutor(1)"


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench latency", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds that contenders take in turns (default 5)")
    parser.add_argument("--requests", type=int, default=500, help="requests a round to the empty model (default 500)")
    parser.add_argument("--agents", type=int, default=8, help="threads that keep the empty model busy (default 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of small requests among large ones (default 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a CPU)")
    parser.add_argument("--shape", choices=("minilm-l6", "bert-base"), default="minilm-l6")
    parser.add_argument("--no-model", action="store_true", help="the machinery alone: no torch")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("latency", "Latency", options)
    round_trips(report, options.rounds, options.requests)
    passage(report, options.rounds, options.agents, options.workers, options.requests)
    if not options.no_model:
        from bench.inputs.models import SHAPES, make_model

        with tempfile.TemporaryDirectory() as folder:
            make_model(folder, SHAPES[options.shape])
            one_large(report, folder, options.rounds, options.workers)
            small_among_large(report, folder, options.rounds, options.seconds, options.workers)
    finish(report, options.out)
    return 0


def texts(documents: int, words: int = 60) -> list[str]:
    """That many documents, no two the same."""
    return [f"document {i} " + "word " * words for i in range(documents)]


def round_trips(report: Report, rounds: int, requests: int) -> None:
    """Requests one after the other to an empty model, and the same texts to an executor's process and back."""
    with (
        RerankerPool(EMPTY, devices="cpu", workers=1, threads_per_worker=1, coalesce=False) as pool,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as bare,
    ):
        for documents in (1, 10):
            batch = texts(documents)
            pairs = [("a query", document) for document in batch]
            calls: dict[str, Callable[[], object]] = {
                OURS: lambda batch=batch: pool.submit("a query", batch).result(),
                BARE: lambda pairs=pairs: bare.submit(zeros, pairs).result(),
            }
            waits = in_turns(calls, rounds, requests)
            for name in calls:
                of = {"an empty model": name, "documents": documents}
                add_quantiles(report, of, waits[name])


def zeros(pairs: list[tuple[str, str]]) -> bytes:
    """What the bare executor's process does: as little as the empty model, with an answer of the same size."""
    return bytes(4 * len(pairs))


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, times: int) -> dict[str, list[list[float]]]:
    """Seconds that each of ``times`` calls took, contender by contender and round by round, after a warm-up."""
    waits: dict[str, list[list[float]]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(min(times, 50)):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            waits[name].append([timed(call) for _ in range(times)])
    return waits


def timed(call: Callable[[], object]) -> float:
    """Seconds that ``call`` took."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def add_quantiles(report: Report, of: dict[str, object], rounds: list[list[float]]) -> None:
    """The quantiles of each round, as milliseconds."""
    for measure, share in QUANTILES.items():
        report.add(of, measure, [1000 * quantile(waits, share) for waits in rounds])


def passage(report: Report, rounds: int, agents: int, workers: int, requests: int) -> None:
    """Pairs a second to an empty model and back, with agents that wait for each of their requests."""
    with RerankerPool(EMPTY, devices="cpu", workers=workers, threads_per_worker=1, coalesce=False) as pool:
        for documents, words in ((1, 10), (50, 10), (50, 60)):
            batch = texts(documents, words)
            times = max(1, requests // documents) if documents > 1 else max(1, requests // agents)

            def agent(_: int, batch: list[str] = batch, times: int = times) -> None:
                for _ in range(times):
                    pool.rerank("a query", batch)

            rates, cpu = [], []
            with ThreadPoolExecutor(agents) as threads:
                list(threads.map(agent, range(agents)))
                for _ in range(rounds):
                    burnt, start = time.process_time(), time.perf_counter()
                    list(threads.map(agent, range(agents)))
                    seconds = time.perf_counter() - start
                    rates.append(agents * times * documents / seconds)
                    cpu.append(1e6 * (time.process_time() - burnt) / (agents * times * documents))
            of = {"agents": agents, "documents a request": documents, "words": words}
            report.add(of, "pairs/s through an empty model", rates, better="higher")
            report.add(of, "CPU of the parent, µs a pair", cpu)


def one_large(report: Report, folder: str, rounds: int, workers: int, documents: int = 100) -> None:
    """One request on an idle pool, beside ``predict`` on all cores."""
    from sentence_transformers import CrossEncoder

    from bench.inputs.models import make_requests

    (pairs,) = make_requests(1, documents, 60)
    model = CrossEncoder(folder, device="cpu")
    with RerankerPool(folder, devices="cpu", workers=workers, coalesce=False) as pool:
        calls: dict[str, Callable[[], object]] = {
            OURS: lambda: pool.submit_pairs(pairs).result(),
            "CrossEncoder.predict, all cores": lambda: model.predict(pairs, show_progress_bar=False),
        }
        for call in calls.values():
            call()
        waits: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                waits[name].append(1000 * timed(call))
    for name in calls:
        report.add({f"one request of {documents}": name}, "ms", waits[name])


def small_among_large(report: Report, folder: str, rounds: int, seconds: float, workers: int) -> None:
    """Requests of 10 while two agents have one of 100 pending each, to the pool and to one model with a lock."""
    from sentence_transformers import CrossEncoder

    from bench.inputs.models import make_requests

    (small,), large = make_requests(1, 10, 60), make_requests(2, 100, 60)
    model = CrossEncoder(folder, device="cpu")
    lock = threading.Lock()

    def locked(pairs: list[tuple[str, str]]) -> object:
        with lock:
            return model.predict(pairs, show_progress_bar=False)

    with RerankerPool(folder, devices="cpu", workers=workers, coalesce=False) as pool:
        contenders: dict[str, Callable[[list[tuple[str, str]]], object]] = {
            OURS: lambda pairs: pool.submit_pairs(pairs).result(),
            "one CrossEncoder, a lock": locked,
        }
        for name, score in contenders.items():
            for company in (False, True):
                stop = threading.Event()
                busy = [threading.Thread(target=keep, args=(score, pairs, stop)) for pairs in large if company]
                for thread in busy:
                    thread.start()
                waits: list[float] = []
                end = time.perf_counter() + (seconds if company else seconds / 4)
                while not waits or time.perf_counter() < end:
                    waits.append(timed(lambda score=score: score(small)))
                stop.set()
                for thread in busy:
                    thread.join()
                of = {"requests of 10": name, "beside": "two of 100" if company else "nothing"}
                parts = max(1, min(rounds, len(waits) // 20))  # of fewer, quantiles say little
                add_quantiles(report, of, [waits[i::parts] for i in range(parts)])
                report.add(of, "requests", len(waits), better="")


def keep(score: Callable[[list[tuple[str, str]]], object], pairs: list[tuple[str, str]], stop: threading.Event) -> None:
    """Have ``pairs`` scored again and again."""
    while not stop.is_set():
        score(pairs)
