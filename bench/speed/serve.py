"""`python -m bench serve`: what HTTP costs, and what it saves, beside the pool itself and beside a lock.

Three ways to have one model scored: `pool`, threads in this process that call `RerankerPool.rerank`; `serve`, clients
of `mp-rerank serve` on loopback; `lock`, clients of a FastAPI application with one `CrossEncoder` behind a lock, as
many have it. Clients ask again as soon as they have their answer, each on a connection of its own that stays open.
They are one process, on the cores that the server computes on, and so cost something themselves. Rounds take turns.

Three questions: pairs a second by the number of clients; the delay of small requests while a large one is being scored;
and what HTTP adds to one small request, with a model that takes no time (`empty`).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.inputs.fakes import EMPTY, TESTS
from mp_rerank import ModelSpec, RerankerPool

ROOT = Path(__file__).parents[2]
#: clients, and documents of each request: few where many clients would take minutes for one request each
LOADS = ((1, 50), (8, 50), (64, 50), (512, 5))
WORDS = 60
TEXT = [
    "a",
    "library",
    "keeps",
    "books",
    "maps",
    "and",
    "letters",
    "for",
    "the",
    "people",
    "of",
    "the",
    "town",
    "who",
    "come",
    "to",
    "read",
    "on",
    "quiet",
    "mornings",
]

SERVED = """
import logging
from mp_rerank.config import ModelSpec
from mp_rerank.server.config import ServerConfig
from mp_rerank.server.limits import Limits
from mp_rerank.server.run import serve
logging.basicConfig(level=logging.WARNING)
limits = Limits(requests_per_caller=1024)
serve(ServerConfig({{"model": ModelSpec({name!r}, loader={loader!r})}}, memory="64GiB", port=0, limits=limits,
                   pool={{"devices": "cpu", "workers": {workers}}}))
"""
LOCKED = """
import threading
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import CrossEncoder
import mp_rerank.config

model, lock, app = CrossEncoder(str(mp_rerank.config.BUILTIN_FOLDER), device="cpu"), threading.Lock(), FastAPI()

class Body(BaseModel):
    query: str
    texts: list[str]

@app.post("/rerank")
def rerank(body: Body):
    with lock:
        scores = model.predict([(body.query, text) for text in body.texts], show_progress_bar=False).tolist()
    return [{"index": i, "score": scores[i]} for i in sorted(range(len(scores)), key=lambda i: -scores[i])]

server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="info", access_log=False))
server.run()
"""


def main(argv: Sequence[str]) -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of all of them, whose medians are shown")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", default="pool,serve,lock", help="which of them")
    parser.add_argument(
        "--loads",
        default=",".join(f"{clients}x{documents}" for clients, documents in LOADS),
        help="numbers of clients, and of documents of each request (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    loads = [
        (int(clients), int(documents)) for clients, _, documents in (x.partition("x") for x in options.loads.split(","))
    ]
    report = Bench(options.seconds, options.rounds, options.workers, options.arms.split(","), loads).run()
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 1 if any(row["errors"] for row in report["throughput"]) else 0


class Bench:
    """One run."""

    def __init__(
        self, seconds: float, rounds: int, workers: int, arms: list[str], loads: list[tuple[int, int]]
    ) -> None:
        self.seconds = seconds
        self.rounds = rounds
        self.workers = workers
        self.arms = arms
        self.loads = loads

    def run(self) -> dict[str, Any]:
        """All that is measured."""
        report: dict[str, Any] = {"machine": _machine(), "seconds": self.seconds, "rounds": self.rounds}
        measured: dict[tuple[str, str], list[Any]] = {}
        with self._asking("builtin", None) as asking:
            for arm in asking:  # tokenizers, caches, the pool's estimates of lengths
                asking[arm](8, _body(50, 0), 1.0)
            for _ in range(self.rounds):
                for clients, documents in self.loads:
                    for arm in asking:
                        seconds = self.seconds * (3 if clients == 512 else 1)
                        found = asking[arm](clients, _body(documents, 0), seconds)
                        measured.setdefault((arm, f"{clients} x {documents}"), []).append(found)
                for arm in asking:
                    found = self._beside_large(asking[arm])
                    measured.setdefault((arm, "beside"), []).append(found)
        report["throughput"] = [
            _row(arm, clients, documents, measured[arm, f"{clients} x {documents}"])
            for clients, documents in self.loads
            for arm in self.arms
        ]
        report["small beside large"] = [_delays(arm, measured[arm, "beside"]) for arm in self.arms]
        report["added"] = self._added()
        return report

    def _beside_large(self, ask: Callable[..., Any]) -> Any:
        """Small requests, one after the other, while another client asks for 1,000 documents again and again."""
        stop = threading.Event()
        large = threading.Thread(target=lambda: ask(1, _body(1000, 1), self.seconds * 2, stop))
        large.start()
        time.sleep(0.3)  # it is under way
        found = ask(1, _body(1, 2), self.seconds)
        stop.set()
        large.join()
        return found

    def _added(self) -> list[dict[str, Any]]:
        found: dict[str, list[float]] = {}
        with self._asking("empty", EMPTY) as asking:
            for _ in range(self.rounds):
                for arm in asking:
                    for documents in (1, 50):
                        times = asking[arm](1, _body(documents, 3), self.seconds / 2)[1]
                        found.setdefault(f"{arm}, {documents} documents", []).append(statistics.median(times))
        return [{"what": what, "median_ms": statistics.median(times) * 1000} for what, times in found.items()]

    @contextmanager
    def _asking(self, name: str, loader: str | None) -> Iterator[dict[str, Callable[..., Any]]]:
        """How to ask each arm: called with the number of clients, a request, and seconds."""
        asking: dict[str, Callable[..., Any]] = {}
        processes = []
        pool = None
        try:
            if "pool" in self.arms:
                pool = RerankerPool(ModelSpec(name, loader=loader), devices="cpu", workers=self.workers).start()
                asking["pool"] = lambda *load: _ask_pool(pool, *load)
            if "serve" in self.arms:
                code = SERVED.format(name=name, loader=loader, workers=self.workers)
                process, url = start_server(code, r"listening at (\S+),", "ready at")
                processes.append(process)
                asking["serve"] = lambda *load: asyncio.run(_ask_server(url, *load))
            if "lock" in self.arms and loader is None:
                process, locked = start_server(LOCKED, r"running on (\S+)")
                processes.append(process)
                asking["lock"] = lambda *load: asyncio.run(_ask_server(locked, *load))
            yield asking
        finally:
            if pool is not None:
                pool.close(drain=False)
            for process in processes:
                process.terminate()
                process.wait(30)


def _body(documents: int, seed: int) -> dict[str, Any]:
    texts = [
        " ".join([str(seed), str(i), *(TEXT[(i + j) % len(TEXT)] for j in range(WORDS - 2))]) for i in range(documents)
    ]
    return {"query": "where do people read in the morning?", "texts": texts}


def start_server(code: str, address: str, ready: str | None = None) -> tuple[subprocess.Popen[str], str]:
    """Start a server's code in a process of its own, and wait until it is there; the process, and its URL."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), TESTS])}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    url = ""
    for line in process.stderr:
        found = re.search(address, line)
        url = found[1] if found else url
        if url and (ready is None or ready in line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, url
    raise RuntimeError("the server ended while it started")


def _ask_pool(
    pool: RerankerPool, clients: int, body: dict[str, Any], seconds: float, stop: threading.Event | None = None
) -> tuple[float, list[float], Counter[str]]:
    """Seconds it took, the time of each request, and errors by their name."""
    times: list[float] = []
    errors: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    def agent(number: int) -> None:
        documents = [f"{number} {text}" for text in body["texts"]]
        while time.perf_counter() < end and not (stop and stop.is_set()):
            begun = time.perf_counter()
            try:
                pool.rerank(body["query"], documents, caller=str(number))
                times.append(time.perf_counter() - begun)
            except Exception as error:
                errors[type(error).__name__] += 1

    begun = time.perf_counter()
    threads = [threading.Thread(target=agent, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun, times, errors


async def _ask_server(
    url: str, clients: int, body: dict[str, Any], seconds: float, stop: threading.Event | None = None
) -> tuple[float, list[float], Counter[str]]:
    """As `_ask_pool`, over HTTP; an error is a status other than 200 and 429, or a connection that breaks."""
    parts = urlsplit(url)
    times: list[float] = []
    errors: Counter[str] = Counter()
    end = time.perf_counter() + seconds

    async def client(number: int) -> None:
        content = json.dumps({**body, "texts": [f"{number} {text}" for text in body["texts"]]}).encode()
        head = "POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(content)}"
        request = f"{head}\r\n\r\n".encode() + content
        try:
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**24)
            while time.perf_counter() < end and not (stop and stop.is_set()):
                begun = time.perf_counter()
                writer.write(request)
                headers = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"content-length: (\d+)", headers)
                assert length is not None
                await reader.readexactly(int(length[1]))
                status = headers.split(b" ", 2)[1].decode()
                if status == "200":
                    times.append(time.perf_counter() - begun)
                elif status != "429":
                    errors[status] += 1
            writer.close()
        except (OSError, EOFError) as error:
            errors[type(error).__name__] += 1

    begun = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    return time.perf_counter() - begun, times, errors


def _row(arm: str, clients: int, documents: int, rounds: list[Any]) -> dict[str, Any]:
    rates = [len(times) * documents / seconds for seconds, times, _ in rounds]
    errors: Counter[str] = sum((errors for _, _, errors in rounds), Counter())
    return {
        "arm": arm,
        "clients": clients,
        "documents": documents,
        "pairs_per_second": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        **_percentiles([time for _, times, _ in rounds for time in times]),
        "errors": dict(errors),
    }


def _delays(arm: str, rounds: list[Any]) -> dict[str, Any]:
    times = [time for _, times, _ in rounds for time in times]
    return {"arm": arm, "requests": len(times), **_percentiles(times)}


def _percentiles(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        f"p{percent}_ms": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] * 1000
        if ordered
        else float("nan")
        for percent in (50, 95, 99)
    }


def _machine() -> str:
    from mp_rerank._planning.machine import read_machine

    machine = read_machine()
    return f"{machine.affinity} CPUs, {machine.cpu_model}, Python {sys.version.split()[0]}"


def _table(report: dict[str, Any]) -> str:
    lines = [report["machine"], "", "clients x documents | arm | pairs/s (least to most) | p50 | p95 | p99 ms | errors"]
    for row in report["throughput"]:
        least, most = row["spread"]
        lines.append(
            f"{row['clients']} x {row['documents']} | {row['arm']} | "
            f"{row['pairs_per_second']:.0f} ({least:.0f} to {most:.0f}) | "
            f"{row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['p99_ms']:.1f} | {row['errors'] or 0}"
        )
    lines += ["", "one document beside 1,000 | arm | requests | p50 | p95 | p99 ms"]
    for row in report["small beside large"]:
        lines.append(
            f"| {row['arm']} | {row['requests']} | {row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['p99_ms']:.1f}"
        )
    lines += ["", "a model that takes no time, one client | median ms"]
    lines += [f"{row['what']} | {row['median_ms']:.2f}" for row in report["added"]]
    return "\n".join(lines)
