"""`python -m bench latency`: how long one request takes, alone and beside others.

The report has three tables:

1. The pool without a model's time: from `submit` to an empty model and back, in turns with a bare
   `ProcessPoolExecutor(1)` that gets the same texts; and the pairs a second when agents keep the pool busy.
2. One request of 100 documents on an idle pool, in turns with `CrossEncoder.predict` on all cores.
3. Requests of 10 documents while two agents submit requests of 100, one after another: to the pool, and to one model
   behind a lock.

With `--no-model` only the first is measured, which needs no torch.
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
    parser.add_argument("--no-model", action="store_true", help="only with an empty model: needs no torch")
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
    """Send requests to an empty model, one after another, and the same texts to an executor's process."""
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
    """The bare executor's task: as little work as the empty model's, and a result of the same size."""
    return bytes(4 * len(pairs))


def in_turns(calls: dict[str, Callable[[], object]], rounds: int, times: int) -> dict[str, list[list[float]]]:
    """The seconds of each of ``times`` calls, by contender and round, after a warm-up."""
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
    """Measure pairs a second to an empty model and back; each agent waits for its request before the next."""
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
    """Measure one request on an idle pool, and ``predict`` on all cores."""
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
    """Measure requests of 10 while two agents each have one of 100 pending: the pool, and one model behind a lock."""
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
                parts = max(1, min(rounds, len(waits) // 20))  # fewer than 20 requests have no meaningful quantiles
                add_quantiles(report, of, [waits[i::parts] for i in range(parts)])
                report.add(of, "requests", len(waits), better="")


def keep(score: Callable[[list[tuple[str, str]]], object], pairs: list[tuple[str, str]], stop: threading.Event) -> None:
    """Score ``pairs`` again and again until ``stop`` is set."""
    while not stop.is_set():
        score(pairs)
