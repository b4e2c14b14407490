"""`python -m bench serve-soak`: a server under what clients and the system do to one, and a check of every answer.

Agents ask through `mp_rerank.connect` and check every score. Others send bodies that are no JSON, break off in the
middle of a body, or go away while they wait. Now and then a worker is killed, a document kills the workers that score
it, or the models are loaded anew. All of it at a pace (`--rate`, `--every`), so that the machine can do something else
meanwhile. Each of these counts must be 0:

lost         requests of agents without an outcome
wrong        scores that are not the model's for the pair
unexplained  errors that no agent's and no other action explains
left         requests that the server still counts at the end, and workers that outlive it
swollen      1 if the server's own memory has grown by half, after the first tenth of the time
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench.inputs.fakes import PACED, score_of
from bench.speed.serve import SERVED, start_server
from mp_rerank import CallerStats, RequestTimeoutError, RerankerClient, WorkerCrashedError, connect

SECONDS_PER_TOKEN = 5e-6
PATIENCE = 60.0
BROKEN = (b"", b"{", b"[]", b'{"query": 1}', b'{"query": "q", "texts": [1]}', b"\xff" * 50)
FAULTS = ("lost", "wrong", "unexplained", "left", "swollen")
# Of memory after the first tenth of the time: what allocators keep is less, and a leak of hours is more.
SWOLLEN = 1.5
# A request that takes seconds, whose client goes away: 64 documents of 5,000 words.
LONG = [f"{i} " + "word " * 5000 for i in range(64)]


def main(argv: Sequence[str]) -> int:
    """Run, and print the counts; 1 if any is not 0."""
    parser = argparse.ArgumentParser(prog="python -m bench serve-soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--rate", type=float, default=50.0, help="requests a second, of all agents together")
    parser.add_argument("--every", type=float, default=3.0, help="seconds between two things that end workers")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = Soak(options.seconds, options.agents, options.rate, options.every, options.seed).run()
    print(json.dumps(report, indent=2))
    return 1 if any(report[name] for name in FAULTS) else 0


class Soak:
    """One run, and its counts."""

    def __init__(self, seconds: float, agents: int, rate: float, every: float, seed: int) -> None:
        self.seconds = seconds
        self.agents = agents
        self.rate = rate
        self.every = every
        self.seed = seed
        self.freed: list[float] = []  # seconds until a client's place was free, once it had gone
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.stop = threading.Event()

    def run(self) -> dict[str, Any]:
        """All of it."""
        code = SERVED.format(name=str(SECONDS_PER_TOKEN), loader=PACED, workers=2)
        process, url = start_server(code, r"listening at (\S+),", "ready at")
        server = psutil.Process(process.pid)
        pool = connect(url, retry_for=PATIENCE)
        try:
            pool.start()
            acts: list[Callable[[], None]] = [partial(self._agent, pool, number) for number in range(self.agents)]
            acts += [partial(self._rude, url), partial(self._leave, url, pool), partial(self._disturb, pool, server)]
            actors = [threading.Thread(target=self._guarded, args=(act,), daemon=True) for act in acts]
            for actor in actors:
                actor.start()
            memory, files = self._watch(server)
            self.stop.set()
            for actor in actors:
                actor.join(PATIENCE)
            self.counts["lost"] += sum(actor.is_alive() for actor in actors)
            self.counts["left"] += self._still_counted(pool)
            stats = pool.stats()
        finally:
            pool.close(drain=False)
            workers = server.children(recursive=True)
            process.terminate()
            process.wait(PATIENCE)
            self.counts["left"] += len(psutil.wait_procs(workers, PATIENCE)[1])
        self.counts["swollen"] = int(max(memory) > SWOLLEN * memory[0])
        return {
            **{name: self.counts[name] for name in FAULTS},
            "checked": self.counts["checked"],
            "kinds": dict(self.kinds),
            "worker_exits": stats.exits,
            "reloads": stats.reloads,
            "freed_ms": _spread([seconds * 1000 for seconds in self.freed]),
            "server_rss_MiB": [round(rss / 2**20, 1) for rss in memory],
            "server_files": files,
        }

    def _watch(self, server: psutil.Process) -> tuple[list[int], list[int]]:
        """The server's memory and its open files at ten moments, the first after a tenth of the time."""
        memory, files = [], []
        for _ in range(10):
            self.stop.wait(self.seconds / 10)
            memory.append(server.memory_info().rss)
            files.append(server.num_fds())
        return memory, files

    def _still_counted(self, pool: RerankerClient) -> int:
        end = time.monotonic() + PATIENCE
        while (left := pool.stats().pending_pairs) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._unexplained(f"{act.func.__name__}: {error!r}")  # type: ignore[attr-defined]

    def _unexplained(self, what: str) -> None:
        self.counts["unexplained"] += 1
        print(f"unexplained: {what}", flush=True)

    def _agent(self, pool: RerankerClient, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        turn = 0
        while not self.stop.is_set():
            turn += 1
            self.stop.wait(chance.expovariate(self.rate / self.agents))
            kind = chance.choices(("plain", "late", "cancelled"), (80, 10, 10))[0]
            query = f"query {chance.randrange(5)}"
            documents = [f"{number} {turn} {i}" for i in range(chance.choice((1, 10, 50, 300)))]
            try:
                self._ask(pool, kind, query, documents, chance)
            except Exception as error:
                self.kinds[f"{kind}: {type(error).__name__}"] += 1
                self._unexplained(f"{kind}: {error!r}")

    def _ask(self, pool: RerankerClient, kind: str, query: str, documents: list[str], chance: random.Random) -> None:
        if kind == "deadly":
            documents.insert(chance.randrange(len(documents) + 1), "!os._exit 3")
        future = pool.submit(query, documents, timeout=0.02 if kind == "late" else None, caller=kind)
        if kind == "cancelled":
            time.sleep(chance.random() * 0.02)
            if future.cancel():
                self.kinds["cancelled"] += 1
                return
        try:
            results = future.result(PATIENCE)
        except WorkerCrashedError:
            if kind != "deadly":
                raise
            self.kinds["deadly: WorkerCrashedError"] += 1
            return
        except RequestTimeoutError:
            if kind != "late":
                raise
            self.kinds["late: RequestTimeoutError"] += 1
            return
        if kind == "deadly":
            raise AssertionError("a document that kills its worker was scored")
        self.kinds[f"{kind}: scored"] += 1
        for result in results:
            self.counts["checked"] += 1
            if result.relevance_score != score_of(query, documents[result.index]):
                self.counts["wrong"] += 1

    def _rude(self, url: str) -> None:
        """Bad bodies, broken ones, and clients that go away."""
        chance = random.Random(self.seed)
        parts = urlsplit(url)
        while not self.stop.is_set():
            body = json.dumps({"query": "q", "texts": [f"rude {chance.random()} {i}" for i in range(100)]}).encode()
            kind = chance.choice(("bad", "broken off", "gone"))
            content = chance.choice(BROKEN) if kind == "bad" else body
            head = (
                f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
            )
            with contextlib.suppress(OSError), socket.create_connection((parts.hostname, parts.port), 10) as sock:
                sock.sendall(head.encode() + b"\r\n\r\n" + (content[:100] if kind == "broken off" else content))
                if kind == "bad":
                    status = sock.recv(100).split(b" ", 2)[1:2]
                    if status not in ([b"400"], [b"422"]):
                        self._unexplained(f"{content!r}: {status}")
            self.kinds[kind] += 1
            self.stop.wait(chance.expovariate(self.rate / 2))

    def _leave(self, url: str, pool: RerankerClient) -> None:
        """A client whose request takes seconds goes away, and looks how soon the server has forgotten it."""
        parts = urlsplit(url)
        content = json.dumps({"query": "q", "documents": LONG}).encode()
        head = f"POST /rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
        while not self.stop.wait(self.every):
            before = _leaver(pool)
            with socket.create_connection((parts.hostname, parts.port), PATIENCE) as sock:
                sock.sendall(f"{head}\r\nX-Caller: leaver\r\n\r\n".encode() + content)
                there = _until(partial(_has_come, pool, before))
            gone = time.monotonic()
            if not (there and _until(lambda: not _leaver(pool).pending_requests)):
                raise TimeoutError(f"a client that {'went away was' if there else 'had come was not'} counted")
            seconds = time.monotonic() - gone
            if _leaver(pool).cancelled > before.cancelled:  # or it was scored before we looked
                self.freed.append(seconds)

    def _disturb(self, pool: RerankerClient, server: psutil.Process) -> None:
        """Ends workers, one thing after the other: no document of nobody's fault may be there three times."""
        chance = random.Random(self.seed)
        turn = 0
        while not self.stop.wait(self.every * (0.5 + chance.random())):
            turn += 1
            what = chance.choices(("kill", "deadly", "reload"), (60, 20, 20))[0]
            if what == "deadly":
                self._ask(pool, what, "query", [f"{turn} {i}" for i in range(10)], chance)
            elif what == "reload":
                after = pool.stats().reloads + 1
                server.send_signal(signal.SIGUSR1)
                if not _until(partial(_reloaded, pool, after)):
                    raise TimeoutError("the models were not loaded anew")
            else:
                pids = [worker.pid for worker in pool.workers() if worker.pid is not None]
                if pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(chance.choice(pids), signal.SIGKILL)
                    self.kinds["kill"] += 1


def _leaver(pool: RerankerClient) -> CallerStats:
    return pool.stats().callers.get("header:leaver", CallerStats())


def _has_come(pool: RerankerClient, before: CallerStats) -> bool:
    return _leaver(pool).submitted > before.submitted


def _reloaded(pool: RerankerClient, times: int) -> bool:
    return pool.stats().reloads >= times


def _until(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def _spread(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {"least": min(values), "median": statistics.median(values), "most": max(values)}
    return {"times": len(values), **{name: round(value, 1) for name, value in found.items()}}
