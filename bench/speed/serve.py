"""`python -m bench serve`: what HTTP costs, and what it saves, beside the pool itself, a lock, and Infinity's server.

Four ways to have one model scored: `pool`, threads in this process that call `RerankerPool.rerank`; `serve`, clients
of `mp-rerank serve` on loopback; `lock`, clients of a FastAPI application with one `CrossEncoder` behind a lock, as
many have it (FastAPI has to be installed); `infinity`, clients of Infinity's server, which needs older libraries:
`--infinity` names the Python of an environment that has it. Clients ask again as soon as they have their answer, each
on a connection of its own that stays open. They are one process, on the cores that the servers compute on, and so cost
something themselves. The contenders take turns, in another order each round.

Three questions: pairs a second by the number of clients; the delay of small requests while a large one is being scored;
and what HTTP adds to one small request, with a model that takes no time (`empty`).

An environment for Infinity:

    python3.11 -m venv infinity
    infinity/bin/pip install torch 'infinity-emb[server,torch]==0.0.78' 'transformers==4.48.*' 'click<8.2'
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bench.inputs.fakes import EMPTY, TESTS
from bench.reports.files import add_output, finish
from bench.reports.report import Report, quantile
from mp_rerank import ModelSpec, RerankerPool
from mp_rerank.config import BUILTIN, BUILTIN_FOLDER

ROOT = Path(__file__).parents[2]
#: clients, and documents of each request: few where many clients would take minutes for one request each
LOADS = ["1x50", "8x50", "64x50", "512x5"]
LARGE = 1000  # documents
WORDS = 60
TEXT = "a library keeps books maps and letters for the people of the town who come to read on quiet mornings"
PARTS = ["throughput", "beside", "added"]
# A measurement that takes longer has failed.
PATIENCE = 300.0
NAMES = {
    "pool": "mp_rerank, the pool itself",
    "serve": "mp_rerank serve",
    "lock": "FastAPI and a lock",
    "infinity": "Infinity's server",
}

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
    """Measure, and write the report; 1 if a request failed other than at a bound."""
    parser = argparse.ArgumentParser(prog="python -m bench serve", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of all of them")
    parser.add_argument("--workers", type=int, default=2, help="of the pools")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=["pool", "serve", "lock"])
    parser.add_argument("--infinity", type=Path, help="the Python of an environment with Infinity: a contender, too")
    parser.add_argument("--loads", nargs="+", default=LOADS, help="numbers of clients x documents of each request")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="which of the three questions")
    parser.add_argument("--name", default="serve", help="of the files that are written")
    add_output(parser)
    options = parser.parse_args(argv)
    if options.infinity is not None and "infinity" not in options.contenders:
        options.contenders = [*options.contenders, "infinity"]
    report = Report.begin(options.name, "The pool over HTTP", options)
    failed = Bench(report, options).run()
    finish(report, options.out)
    return 1 if failed else 0


@dataclass
class Measured:
    """What came of one measurement.

    Attributes:
        seconds: how long it took.
        times: seconds of each request that was answered.
        refused: how often a bound was met (429).
        errors: whatever else went wrong, by its name.
    """

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Requests answered a second."""
        return len(self.times) / self.seconds


#: asks one contender: so many clients, this query and these documents, for so many seconds, or until it is told to stop
Ask = Callable[[int, list[str], float, "threading.Event | None"], Measured]


class Bench:
    """One run."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self.report = report
        self.seconds: float = options.seconds
        self.rounds: int = options.rounds
        self.workers: int = options.workers
        self.infinity: Path | None = options.infinity
        self.contenders = list(options.contenders)
        self.parts: list[str] = list(options.parts)
        self.loads = [tuple(map(int, load.split("x"))) for load in options.loads] if "throughput" in self.parts else []

    def run(self) -> bool:
        """Measure all of it; whether a request failed."""
        found: dict[tuple[Any, ...], list[Measured]] = {}
        with ExitStack() as stack:
            asking = self._asking(stack, BUILTIN, None)
            for ask in asking.values():  # tokenizers, caches, the pool's estimates of lengths
                ask(8, _documents(50), 1.0, None)
            for turn in range(self.rounds):
                order = self.contenders[turn % len(asking) :] + self.contenders[: turn % len(asking)]
                for clients, documents in self.loads:
                    for name in order:
                        measured = asking[name](clients, _documents(documents), self.seconds, None)
                        found.setdefault((clients, documents, name), []).append(measured)
                for name in order if "beside" in self.parts else ():
                    found.setdefault((name,), []).append(self._beside_large(asking[name]))
        self._report_throughput(found)
        self._report_delays(found)
        if "added" in self.parts:
            self._report_added()
        errors = sum((measured.errors for rounds in found.values() for measured in rounds), Counter[str]())
        self.report.note(f"Requests that failed, other than at a bound: {dict(errors) or 'none'}.")
        return bool(errors)

    def _report_throughput(self, found: dict[tuple[Any, ...], list[Measured]]) -> None:
        for clients, documents in self.loads:
            for name in self.contenders:
                rounds = found[clients, documents, name]
                of = {"clients": clients, "documents": documents, "contender": NAMES[name]}
                rates = [measured.rate * documents for measured in rounds]
                self.report.add(of, "pairs/s", rates, better="higher")
                self._add_quantiles(of, [time for measured in rounds for time in measured.times])
                self.report.add(of, "requests", sum(len(measured.times) for measured in rounds), better="")
                self.report.add(of, "refused (429)", sum(measured.refused for measured in rounds), better="")
                if name != "pool" and "pool" in self.contenders:
                    owns = [measured.rate * documents for measured in found[clients, documents, "pool"]]
                    shares = [100 * rate / own for rate, own in zip(rates, owns, strict=True)]
                    self.report.add(of, "of the pool's own, %", shares, better="higher")

    def _report_delays(self, found: dict[tuple[Any, ...], list[Measured]]) -> None:
        for name in self.contenders if "beside" in self.parts else ():
            times = [time for measured in found[name,] for time in measured.times]
            of = {f"one document, beside {LARGE:,}": NAMES[name]}
            self._add_quantiles(of, times)
            self.report.add(of, "requests", len(times), better="")

    def _report_added(self) -> None:
        """One request after the other, of a model that takes no time."""
        times: dict[tuple[str, int], list[float]] = {}
        with ExitStack() as stack:
            asking = self._asking(stack, "empty", EMPTY)
            for _ in range(self.rounds):
                for documents in (1, 50):
                    for name, ask in asking.items():
                        measured = ask(1, _documents(documents), min(2.0, self.seconds), None)
                        times.setdefault((name, documents), []).append(statistics.median(measured.times) * 1000)
        for (name, documents), medians in times.items():
            of = {"a model that takes no time": NAMES[name], "documents": documents}
            self.report.add(of, "median, ms", medians)

    def _add_quantiles(self, of: dict[str, Any], times: list[float]) -> None:
        for percent in (50, 95, 99) if times else ():
            self.report.add(of, f"p{percent}, ms", quantile(times, percent / 100) * 1000)

    def _beside_large(self, ask: Ask) -> Measured:
        """Small requests, one after the other, while another client has a large one scored again and again."""
        stop = threading.Event()
        large = threading.Thread(target=ask, args=(1, _documents(LARGE), PATIENCE, stop))
        large.start()
        time.sleep(0.3)  # it is under way
        found = ask(1, _documents(1), self.seconds, None)
        stop.set()
        large.join()
        return found

    def _asking(self, stack: ExitStack, model: str, loader: str | None) -> dict[str, Ask]:
        """How to ask each contender, until ``stack`` is left; without rivals if it is a model of the tests."""
        asking: dict[str, Ask] = {}  # in the order of ``self.contenders``, which names the pool first
        if "pool" in self.contenders:
            pool = RerankerPool(ModelSpec(model, loader=loader), devices="cpu", workers=self.workers)
            asking["pool"] = _asking_pool(stack.enter_context(pool))
        if "serve" in self.contenders:
            code = SERVED.format(name=model, loader=loader, workers=self.workers)
            url = stack.enter_context(running(code, r"listening at (\S+),", "ready at"))
            asking["serve"] = _asking_server(url, "texts")
        if "lock" in self.contenders and loader is None:
            url = stack.enter_context(running(LOCKED, r"running on (\S+)"))
            asking["lock"] = _asking_server(url, "texts")
        if "infinity" in self.contenders and loader is None:
            if self.infinity is None:
                raise SystemExit("infinity: its environment is needed: --infinity PYTHON")
            self.report.versions.update(_versions_there(self.infinity))
            url = stack.enter_context(_running_infinity(self.infinity))
            asking["infinity"] = _asking_server(url, "documents", model="model", return_documents=False)
        return asking


def _documents(count: int) -> list[str]:
    words = TEXT.split()
    return [" ".join([str(i), *(words[(i + j) % len(words)] for j in range(WORDS - 1))]) for i in range(count)]


QUERY = "where do people read in the morning?"


def start_server(code: str, address: str, ready: str | None = None) -> tuple[subprocess.Popen[str], str]:
    """Start a server's code in a process of its own, and wait until it is there; the process, and its URL."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), TESTS])}
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    url = ""
    said = []
    for line in process.stderr:
        said.append(line)
        found = re.search(address, line)
        url = found[1] if found else url
        if url and (ready is None or ready in line):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, url
    raise RuntimeError("the server ended while it started: " + "".join(said[-5:]))


@contextmanager
def running(code: str, address: str, ready: str | None = None) -> Iterator[str]:
    """A server's URL; it ends with the context."""
    process, url = start_server(code, address, ready)
    try:
        yield url
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _running_infinity(python: Path) -> Iterator[str]:
    """Infinity's server with the built-in model, from the environment of ``python``."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(python.with_name("infinity_emb")), "v2", "--model-id", str(BUILTIN_FOLDER), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", "model", "--device", "cpu", "--engine", "torch"]
    command += ["--no-bettertransformer", "--url-prefix", ""]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_healthy(process, f"{url}/health")
            yield url
        finally:
            process.terminate()


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("Infinity's server did not start: run its command by hand to see why")


def _versions_there(python: Path) -> dict[str, str]:
    """The versions of Infinity and of what it runs on."""
    names = ("infinity-emb", "torch", "transformers", "sentence-transformers")
    code = f"import importlib.metadata as m; print(*(m.version(name) for name in {names}))"
    said = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=60)
    infinity, *others = said.stdout.split()
    beside = ", ".join(f"{name} {version}" for name, version in zip(names[1:], others, strict=True))
    return {"infinity-emb": f"{infinity} (with {beside})"}


def _asking_pool(pool: RerankerPool) -> Ask:
    def ask(clients: int, documents: list[str], seconds: float, stop: threading.Event | None) -> Measured:
        found = Measured()
        begun = time.perf_counter()

        def agent(number: int) -> None:
            mine = [f"{number} {text}" for text in documents]
            while time.perf_counter() < begun + seconds and not (stop and stop.is_set()):
                asked = time.perf_counter()
                try:
                    pool.rerank(QUERY, mine, caller=str(number))
                    found.times.append(time.perf_counter() - asked)
                except Exception as error:
                    found.errors[type(error).__name__] += 1

        threads = [threading.Thread(target=agent, args=(number,)) for number in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        found.seconds = time.perf_counter() - begun
        return found

    return ask


def _asking_server(url: str, texts: str, **rest: object) -> Ask:
    """Asks a server; an error is a status other than 200 and 429, or a connection that breaks.

    Args:
        texts: what its dialect calls the documents.
        rest: other fields of a body.
    """
    parts = urlsplit(url)

    async def ask_all(clients: int, documents: list[str], seconds: float, stop: threading.Event | None) -> Measured:
        found = Measured()
        begun = time.perf_counter()

        async def client(number: int) -> None:
            body = {"query": QUERY, texts: [f"{number} {text}" for text in documents], **rest}
            request = _request(json.dumps(body).encode())
            try:
                reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=2**24)
                while time.perf_counter() < begun + seconds and not (stop and stop.is_set()):
                    asked = time.perf_counter()
                    writer.write(request)
                    status = await _status(reader)
                    if status == "200":
                        found.times.append(time.perf_counter() - asked)
                    elif status == "429":
                        found.refused += 1
                    else:
                        found.errors[status] += 1
                writer.close()
            except (OSError, EOFError) as error:
                found.errors[type(error).__name__] += 1

        await asyncio.wait_for(asyncio.gather(*(client(number) for number in range(clients))), PATIENCE)
        found.seconds = time.perf_counter() - begun
        return found

    return lambda *load: asyncio.run(ask_all(*load))


def _request(content: bytes) -> bytes:
    head = "POST /rerank HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


async def _status(reader: asyncio.StreamReader) -> str:
    """Read an answer; its status."""
    headers = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", headers)
    assert length is not None
    await reader.readexactly(int(length[1]))
    return headers.split(b" ", 2)[1].decode()
