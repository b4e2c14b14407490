"""`python -m bench serve-soak`: a server under what clients and the system do to one, and a check of every answer.

Agents ask through `mp_rerank.connect` and check every score. Others send bodies that are no JSON, break off in the
middle of a body, or go away while they wait. Some documents kill the worker that scores them; workers are killed
besides. Each of these counts must be 0, and the server's own memory flat:

lost         requests of agents without an outcome
wrong        scores that are not the model's for the pair
unexplained  errors that no agent's and no other action explains
left         requests that the server still counts at the end, and workers that outlive it
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import psutil

from bench.inputs.fakes import PACED, score_of
from bench.speed.serve import SERVED, start_server
from mp_rerank import RequestTimeoutError, RerankerClient, WorkerCrashedError, connect

SECONDS_PER_TOKEN = 5e-6
PATIENCE = 60.0
BROKEN = (b"", b"{", b"[]", b'{"query": 1}', b'{"query": "q", "texts": [1]}', b"\xff" * 50)
FAULTS = ("lost", "wrong", "unexplained", "left")


def main(argv: Sequence[str]) -> int:
    """Run, and print the counts; 1 if any is not 0."""
    parser = argparse.ArgumentParser(prog="python -m bench serve-soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = Soak(options.seconds, options.agents, options.seed).run()
    print(json.dumps(report, indent=2))
    return 1 if any(report[name] for name in FAULTS) else 0


class Soak:
    """One run, and its counts."""

    def __init__(self, seconds: float, agents: int, seed: int) -> None:
        self.seconds = seconds
        self.agents = agents
        self.seed = seed
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
            actors = [threading.Thread(target=self._agent, args=(pool, n), daemon=True) for n in range(self.agents)]
            actors += [threading.Thread(target=act, args=(url, pool), daemon=True) for act in (self._rude, self._kill)]
            for actor in actors:
                actor.start()
            memory = self._watch(server)
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
        return {
            **{name: self.counts[name] for name in FAULTS},
            "checked": self.counts["checked"],
            "kinds": dict(self.kinds),
            "worker_exits": stats.exits,
            "server_rss_MiB": [round(rss / 2**20, 1) for rss in memory],
        }

    def _watch(self, server: psutil.Process) -> list[int]:
        """The server's memory at eleven moments, the first after a tenth of the time."""
        found = []
        for _ in range(11):
            self.stop.wait(self.seconds / 11)
            found.append(server.memory_info().rss)
        return found

    def _still_counted(self, pool: RerankerClient) -> int:
        end = time.monotonic() + PATIENCE
        while (left := pool.stats().pending_pairs) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    def _agent(self, pool: RerankerClient, number: int) -> None:
        chance = random.Random(f"{self.seed} {number}")
        turn = 0
        while not self.stop.is_set():
            turn += 1
            kind = chance.choices(("plain", "late", "cancelled", "deadly"), (80, 8, 8, 4))[0]
            query = f"query {chance.randrange(5)}"
            documents = [f"{number} {turn} {i}" for i in range(chance.choice((1, 10, 50, 300)))]
            try:
                self._ask(pool, kind, query, documents, chance)
            except Exception as error:
                self.kinds[f"{kind}: {type(error).__name__}"] += 1
                self.counts["unexplained"] += 1
                print(f"unexplained: {kind}: {error!r}", flush=True)

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

    def _rude(self, url: str, pool: RerankerClient) -> None:
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
                        self.counts["unexplained"] += 1
                        print(f"unexplained: {content!r}: {status}", flush=True)
            self.kinds[kind] += 1
            time.sleep(chance.random() * 0.02)

    def _kill(self, url: str, pool: RerankerClient) -> None:
        """Kills a worker now and then: not so often that a document of nobody's fault is there three times."""
        chance = random.Random(self.seed)
        while not self.stop.wait(1 + chance.random()):
            pids = [worker.pid for worker in pool.workers() if worker.pid is not None]
            if pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                self.kinds["kill"] += 1
