"""`python -m bench fairness`: how long small requests take, alone and beside what others ask for.

The model takes a fixed time a token, so that only the queue can make a difference. Two parts:

1. Agents of one caller submit requests of 10 documents, one after another; then one request of 5,000 documents is
   always pending beside them. The last line says how long the large request takes alone: small requests would wait that
   long if they had to wait for it.
2. One agent submits requests of 10 documents, one after another, while another agent, a caller of its own, always has
   one request of 5,000 documents pending, or 1, 8 or 500 requests of 10. With 500 it is measured once more with both
   agents as one caller: then each request is one of 501. A single request of 10 documents leaves workers idle at times;
   the others keep them busy.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from bench.inputs import fakes
from mp_rerank import ModelSpec, RerankerPool

SMALL, LARGE = 10, 5000
PENDING = (1, 8, 500)  # requests
WORDS = 60  # about 80 tokens
THINK_SECONDS = 0.05


def main(argv: Sequence[str]) -> int:
    """Measure and print p50 and p95 of the small requests, and the seconds of the large ones."""
    parser = argparse.ArgumentParser(
        prog="python -m bench fairness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--agents", type=int, default=2, help="threads that submit small requests in the first part")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--tokens-per-second", type=float, default=6000.0, help="of one worker")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    model = ModelSpec(f"{1 / options.tokens_per_second}", loader=fakes.PACED)
    with RerankerPool(model, devices="cpu", workers=options.workers, threads_per_worker=1, coalesce=False) as pool:
        one, other = pool.for_caller("one agent"), pool.for_caller("another agent")
        large_waits: list[float] = []
        waits = {
            "alone": _measure(pool, options.agents, options.seconds),
            "  beside one of 5,000": _measure(
                pool, options.agents, options.seconds, partial(_large, pool, large_waits)
            ),
            "one agent alone": _measure(one, 1, options.seconds),
            "  beside another's large one": _measure(one, 1, options.seconds, partial(_large, other, [])),
            **{
                f"  beside another's {count} small": _measure(one, 1, options.seconds, partial(_pending, other, count))
                for count in PENDING
            },
            "  the same, as one caller": _measure(one, 1, options.seconds, partial(_pending, one, PENDING[-1])),
        }
        started = time.monotonic()
        pool.rerank("query", _documents(LARGE))
        whole = time.monotonic() - started
    summaries = {label.strip(): _summary(found) for label, found in waits.items()}
    if options.json:
        report = {**summaries, "large_requests_done_beside": len(large_waits), "large_alone_seconds": round(whole, 2)}
        print(json.dumps(report, indent=2))
        return 0
    print(f"{'requests of 10 documents':<28}{'count':>8}{'p50':>10}{'p95':>10}{'worst':>10}")
    for label, summary in zip(waits, summaries.values(), strict=True):
        values = "".join(f"{summary[name]:>8.0f}ms" for name in ("p50_ms", "p95_ms", "worst_ms"))
        print(f"{label:<28}{summary['count']:>8.0f}{values}")
    print(f"{'one of 5,000 documents':<28}{1:>8}{whole * 1000:>8.0f}ms")
    return 0


def _measure(
    pool: RerankerPool, agents: int, seconds: float, beside: Callable[[threading.Event], None] | None = None
) -> list[float]:
    """The seconds of each small request, while ``beside`` runs on a thread of its own."""
    stop = threading.Event()
    waits: list[float] = []

    def agent(number: int) -> None:
        while not stop.is_set():
            started = time.monotonic()
            pool.rerank(f"query {number}", _documents(SMALL))
            if not stop.is_set():
                waits.append(time.monotonic() - started)
            stop.wait(THINK_SECONDS)

    threads = [threading.Thread(target=agent, args=(number,)) for number in range(agents)]
    if beside is not None:
        threads.append(threading.Thread(target=beside, args=(stop,)))
        threads[-1].start()
        time.sleep(0.5)  # let it fill the workers
    for thread in threads[:agents]:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return waits


def _large(pool: RerankerPool, waits: list[float], stop: threading.Event) -> None:
    """Always have one large request pending; note the seconds of each that is completed."""
    while not stop.is_set():
        started = time.monotonic()
        future = pool.submit("query", _documents(LARGE))
        while not future.done() and not stop.wait(0.01):
            pass
        if not future.cancel():
            waits.append(time.monotonic() - started)


def _pending(pool: RerankerPool, count: int, stop: threading.Event) -> None:
    """Always have ``count`` small requests pending."""
    pending: list[Future[Any]] = []
    number = 0
    while not stop.is_set():
        pending = [future for future in pending if not future.done()]
        while len(pending) < count:
            number += 1
            pending.append(pool.submit(f"other query {number}", _documents(SMALL)))
        stop.wait(0.005)
    for future in pending:
        future.cancel()


def _documents(count: int) -> list[str]:
    return [f"document {i} " + "word " * WORDS for i in range(count)]


def _summary(waits: list[float]) -> dict[str, float]:
    ordered = sorted(waits) or [float("nan")]
    at = {"p50_ms": 0.5, "p95_ms": 0.95, "worst_ms": 1.0}
    return {
        "count": len(waits),
        **{name: round(1000 * ordered[round(share * (len(ordered) - 1))], 1) for name, share in at.items()},
    }
