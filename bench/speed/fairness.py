"""`python -m bench fairness`: how long small requests take, alone and beside a large one.

Agents submit requests of 10 documents, one after another. In the second half of the run, one request of 5,000 documents
is always pending. The model takes a fixed time a token, so that only the queue can make a difference. The last line
says how long the large request takes alone: small requests would wait that long if they had to wait for it.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Sequence

from bench.inputs import fakes
from mp_rerank import ModelSpec, RerankerPool

SMALL, LARGE = 10, 5000
WORDS = 60  # about 80 tokens


def main(argv: Sequence[str]) -> int:
    """Measure and print p50 and p95 of the small requests, and the seconds of the large ones."""
    parser = argparse.ArgumentParser(prog="python -m bench fairness", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="of each half")
    parser.add_argument("--agents", type=int, default=2, help="threads that submit small requests")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--tokens-per-second", type=float, default=6000.0, help="of one worker")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    model = ModelSpec(f"{1 / options.tokens_per_second}", loader=fakes.PACED)
    with RerankerPool(model, devices="cpu", workers=options.workers, threads_per_worker=1, coalesce=False) as pool:
        alone, _ = _measure(pool, options.agents, options.seconds, large=False)
        beside, large = _measure(pool, options.agents, options.seconds, large=True)
        started = time.monotonic()
        pool.rerank("query", _documents(LARGE))
        whole = time.monotonic() - started
    report = {
        "small_alone": _summary(alone),
        "small_beside_large": _summary(beside),
        "large_requests_done_beside": len(large),
        "large_alone_seconds": round(whole, 2),
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return 0
    print(f"{'requests of 10 documents':<28}{'count':>8}{'p50':>10}{'p95':>10}{'worst':>10}")
    for label, waits in (("alone", alone), ("beside one of 5,000", beside)):
        summary = _summary(waits)
        values = "".join(f"{summary[name]:>8.0f}ms" for name in ("p50_ms", "p95_ms", "worst_ms"))
        print(f"{label:<28}{summary['count']:>8.0f}{values}")
    print(f"{'one of 5,000 by itself':<28}{1:>8}{whole * 1000:>8.0f}ms")
    return 0


def _measure(pool: RerankerPool, agents: int, seconds: float, *, large: bool) -> tuple[list[float], list[float]]:
    """The seconds of each small request, and of each large one that was completed."""
    stop = threading.Event()
    small_waits: list[float] = []
    large_waits: list[float] = []

    def agent(number: int) -> None:
        while not stop.is_set():
            started = time.monotonic()
            pool.rerank(f"query {number}", _documents(SMALL))
            small_waits.append(time.monotonic() - started)
            stop.wait(0.05)  # agents think

    def keep_large() -> None:
        while not stop.is_set():
            started = time.monotonic()
            future = pool.submit("query", _documents(LARGE))
            while not future.done() and not stop.wait(0.01):
                pass
            if not future.cancel():
                large_waits.append(time.monotonic() - started)

    threads = [threading.Thread(target=agent, args=(number,)) for number in range(agents)]
    if large:
        threads.append(threading.Thread(target=keep_large))
        threads[-1].start()
        time.sleep(0.5)  # let it fill the workers
    for thread in threads[:agents]:
        thread.start()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return small_waits, large_waits


def _documents(count: int) -> list[str]:
    return [f"document {i} " + "word " * WORDS for i in range(count)]


def _summary(waits: list[float]) -> dict[str, float]:
    ordered = sorted(waits)
    at = {"p50_ms": 0.5, "p95_ms": 0.95, "worst_ms": 1.0}
    return {
        "count": len(ordered),
        **{name: round(1000 * ordered[round(share * (len(ordered) - 1))], 1) for name, share in at.items()},
    }
