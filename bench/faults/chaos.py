"""`python -m bench chaos`: agents in threads, workers that keep dying and hanging, and a check of every request.

Agents submit requests of all sizes and check every score that they get. Some cancel, and some set a deadline. Some
submit documents that kill or hang the worker that scores them, once or every time. Half of the requests share their
queries and documents with others, and some scores are cached. Meanwhile workers are killed and stopped at random
moments, models are reloaded, and workers are recycled. With ``--cluster N`` the seats are N workers of a Dask cluster,
whose nannies are killed and replaced too, and which are retired. Each of these counts must be 0:

lost            requests without an outcome
unexplained     outcomes that no agent's and no other action explains
wrong           scores that are not the model's for the pair, or scores of two models in one request
leaked          processes, threads and files at the end that were not there at the start
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import psutil

from bench.inputs.fakes import CLUSTER_MARK, PACED, Processes, score_of, workers_of
from mp_rerank import ClusterError, ModelSpec, RequestTimeoutError, RerankerPool, RerankResult, WorkerCrashedError

FORK_MODEL = "fork-model"
METHODS = ("spawn", "forkserver", FORK_MODEL)
TEMPLATES_SHARE = 0.2  # of the signals go to the template that has forked the worker
PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h
MODELS = ("red", "green")
SECONDS_PER_TOKEN = 5e-6
# How a document ends the worker that meets it.
DEATHS = {"kill": "!signal SIGKILL", "segfault": "!segfault", "exit": "!os._exit 3"}
HANG_TIMEOUT = 1.0
# The queries and documents that agents share; the cache is smaller than the number of their pairs.
QUERIES, DOCUMENTS, SCORE_CACHE = 4, 100, 300
# What a Dask worker may be away. A nanny starts another in 2 s, and in 6 where all of them do.
CLUSTER_TIMEOUT = 10.0
START_TIMEOUT = 20.0  # for workers that are stopped (SIGSTOP) while they load
# A request is lost if it has no outcome so many seconds after agents and killings have ended.
PATIENCE = 120.0


def main(argv: Sequence[str]) -> int:
    """Run and print the counts; 1 if a request was lost or wrong, or anything leaked."""
    parser = argparse.ArgumentParser(prog="python -m bench chaos", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="how long agents go on (1800: the longest setting)"
    )
    parser.add_argument("--agents", type=int, default=32, help="agent threads")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--cluster", type=int, metavar="N", help="workers of a Dask cluster in place of --workers")
    parser.add_argument("--start-method", choices=METHODS, default="spawn", help="of the workers (default: spawn)")
    parser.add_argument("--seed", type=int, default=0, help="of the agents' and the monkeys' choices")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    logging.getLogger("mp_rerank").addHandler(logging.NullHandler())  # no warning for each death
    if options.start_method == FORK_MODEL:
        _adopt_orphans()
    with tempfile.TemporaryDirectory() as marks:
        chaos = Chaos(options.seconds, options.agents, options.workers, options.seed, Path(marks), options.start_method)
        report = chaos.run_in_cluster(options.cluster) if options.cluster else chaos.run()
    print(json.dumps(report, indent=2) if options.json else _table(report))
    return 1 if any(report[name] for name in FAULTS) else 0


_adopting = False


def _adopt_orphans() -> None:
    """Be the parent of workers whose template has died (Linux), so that none is lost sight of."""
    global _adopting
    _adopting = True
    try:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    except (AttributeError, OSError):  # not on this system
        pass


FAULTS = ("lost", "wrong", "unexplained", "leaked_processes", "leaked_threads", "leaked_files", "unreleased")


class Chaos:
    """One run, and its counts."""

    def __init__(self, seconds: float, agents: int, workers: int, seed: int, marks: Path, start_method: str) -> None:
        self.seconds = seconds
        self.agents = agents
        self.workers = workers
        self.seed = seed
        self.marks = marks
        self.start_method = start_method
        self.stop = threading.Event()
        self.lock = threading.Lock()
        self.outcomes: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.pairs = 0
        self.waits: list[float] = []
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.unexplained: list[str] = []
        self.errors: list[BaseException] = []
        self.cluster: Processes | None = None
        self.nannies: list[psutil.Popen] = []

    def run_in_cluster(self, workers: int) -> dict[str, Any]:
        """As ``run``, with so many workers of a Dask cluster."""
        folder = self.marks / "cluster"
        folder.mkdir()
        self.workers = workers
        self.cluster = Processes(folder)
        try:
            self.nannies = [self.cluster.worker() for _ in range(workers)]
            self.cluster.wait_for(workers)
            return self.run()
        finally:
            self.cluster.close()

    def run(self) -> dict[str, Any]:
        """Run agents and killings, and compare the process before and after; the report."""
        pool = self._pool()
        pool.start().close()  # a first pool starts what stays, such as multiprocessing's tracker
        start = _Footprint.now()
        pool = self._pool().start()
        began = time.monotonic()
        threads = [threading.Thread(target=self._guard, args=(self._agent, pool, n)) for n in range(self.agents)]
        threads.append(threading.Thread(target=self._guard, args=(self._killer, pool, -1)))
        threads.append(threading.Thread(target=self._guard, args=(self._reloader, pool, -2)))
        for thread in threads:
            thread.start()
        settled = None
        while (left := self.seconds - (time.monotonic() - began)) > 0:
            self.stop.wait(min(left, 5.0))
            if settled is None and time.monotonic() - began > min(60.0, self.seconds / 4):
                settled = psutil.Process().memory_info().rss
        self.stop.set()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
        stats = pool.stats()
        workers = [info.state for info in pool.workers()]
        pool.close()
        if self.cluster is not None:
            self.cluster.reap(self.nannies)
        end = _Footprint.now(until=start)
        if self.errors:
            raise self.errors[0]
        return {
            "seconds": round(seconds, 1),
            "agents": self.agents,
            "workers": self.workers,
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(sorted(self.outcomes.items())),
            "pairs_checked": self.pairs,
            "pairs_scored": stats.scored_pairs,
            "pairs_coalesced": stats.coalesced_pairs,
            "pairs_cached": stats.cached_pairs,
            "p50_seconds": round(_quantile(self.waits, 0.5), 2),
            "p99_seconds": round(_quantile(self.waits, 0.99), 2),
            "slowest_seconds": round(_quantile(self.waits, 1.0), 2),
            "kills": dict(sorted(self.kills.items())),
            "crashes": stats.crashes,
            "restarts": stats.restarts,
            "recycled": stats.recycled,
            "reloads": stats.reloads,
            "worker_states_at_end": workers,
            "lost": len(self.lost),
            "wrong": len(self.wrong),
            "unexplained": len(self.unexplained),
            "unreleased": stats.pending_requests + stats.pending_pairs,
            "leaked_processes": max(0, end.processes - start.processes),
            "leaked_threads": max(0, end.threads - start.threads),
            "leaked_files": max(0, end.files - start.files),
            "processes": [start.processes, end.processes],
            "threads": [start.threads, end.threads],
            "files": [start.files, end.files],
            "rss_mib": [round(n / 2**20, 1) for n in (start.rss, settled or end.rss, end.rss)],
            "examples": [*self.lost, *self.wrong, *self.unexplained][:5],
        }

    def _pool(self) -> RerankerPool:
        where: dict[str, Any] = {"workers": self.workers}
        if self.cluster is not None:
            where = {"cluster": self.cluster.address, "cluster_timeout": CLUSTER_TIMEOUT}
        return RerankerPool(
            _spec(MODELS[0]),
            **where,
            devices="cpu",
            threads_per_worker=1,
            start_method=self.start_method,
            start_timeout=START_TIMEOUT,
            hang_timeout=HANG_TIMEOUT,
            restart_backoff=0.05,
            max_restarts=10**6,
            max_slices_per_worker=40,
            max_pending_pairs=20_000,
            score_cache=SCORE_CACHE,
        )

    def _guard(self, work: Callable[[RerankerPool, random.Random], None], pool: RerankerPool, number: int) -> None:
        try:
            work(pool, random.Random(self.seed * 1000 + number))
        except BaseException as error:
            self.errors.append(error)
            self.stop.set()

    # The agents.

    def _agent(self, pool: RerankerPool, chance: random.Random) -> None:
        turn = 0
        while not self.stop.is_set():
            turn += 1
            size = chance.choice([1, 1, 3, 10, 10, 10, 30, 100, 400])
            if chance.random() < 0.5:
                query = f"query {chance.random()}"
                documents = [f"{i} " + "word " * chance.randrange(30) for i in range(size)]
            else:
                query = f"common query {chance.randrange(QUERIES)}"
                documents = [f"{i} " + "word " * (i % 30) for i in chance.choices(range(DOCUMENTS), k=size)]
            kind = chance.choices(
                ["plain", "cancel", "deadline", "partial", "priority", "mortal", "poison", "hang"],
                [60, 8, 8, 8, 8, 6, 1, 1],
            )[0]
            getattr(self, f"_{kind}")(pool, chance, query, documents)

    def _plain(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        self._conclude(pool.submit(query, documents), query, documents, "scored")

    def _priority(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        future = pool.submit(query, documents, priority=chance.randint(-3, 3))
        self._conclude(future, query, documents, "scored")

    def _cancel(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        future = pool.submit(query, documents)
        time.sleep(chance.random() * 0.05)
        if future.cancel():
            self._count("cancelled")
        else:
            self._conclude(future, query, documents, "scored")

    def _deadline(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        try:
            future = pool.submit(query, documents, timeout=chance.random() * 0.2 + 1e-6)
        except RequestTimeoutError:
            self._count("timed out")
        else:
            self._conclude(future, query, documents, "scored", allowed=RequestTimeoutError)

    def _partial(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        try:
            future = pool.submit(query, documents, timeout=chance.random() * 0.2 + 1e-6, on_timeout="partial")
        except RequestTimeoutError:
            self._count("timed out")
        else:
            self._conclude(future, query, documents, "scored", partial=True)

    def _mortal(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        death = chance.choice(list(DEATHS))
        self._insert_once(documents, chance, DEATHS[death])
        with self.lock:
            self.kills[f"document {death}"] += 1
        # Two random deaths may hit the same document: after three deaths it is blamed, as a poison document is.
        self._conclude(pool.submit(query, documents), query, documents, "scored", allowed=WorkerCrashedError)

    def _poison(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        index = chance.randrange(len(documents) + 1)
        documents.insert(index, DEATHS[chance.choice(list(DEATHS))])
        error = self._conclude(pool.submit(query, documents), query, documents, None, allowed=WorkerCrashedError)
        if isinstance(error, WorkerCrashedError) and error.attempts < 3:
            self._note(self.unexplained, f"blamed after {error.attempts} deaths: {error}")

    def _hang(self, pool: RerankerPool, chance: random.Random, query: str, documents: list[str]) -> None:
        self._insert_once(documents, chance, "!hang")
        with self.lock:
            self.kills["document hang"] += 1
        self._conclude(pool.submit(query, documents), query, documents, "scored", allowed=WorkerCrashedError)

    def _insert_once(self, documents: list[str], chance: random.Random, order: str) -> None:
        """Insert a document with an order that only the first worker obeys."""
        mark = self.marks / f"{chance.getrandbits(64):x}"
        documents.insert(chance.randrange(len(documents) + 1), f"!once {mark} {order}")

    def _conclude(
        self,
        future: Future[list[RerankResult]],
        query: str,
        documents: list[str],
        expected: str | None,
        *,
        allowed: type[Exception] | None = None,
        partial: bool = False,
    ) -> BaseException | None:
        """Wait for the outcome, check it and count it."""
        began = time.monotonic()
        while not future.done() and not self.stop.is_set():
            wait([future], timeout=1.0)
        try:
            error = future.exception(PATIENCE)
            with self.lock:
                self.waits.append(time.monotonic() - began)
        except TimeoutError:
            self._note(self.lost, f"no outcome: {query}, {len(documents)} documents")
            self._count("lost")
            return None
        except CancelledError:
            self._note(self.lost, f"cancelled by nobody: {query}")
            self._count("lost")
            return None
        if error is not None:
            if isinstance(error, WorkerCrashedError) and error.attempts >= 3 and error.document_index is not None:
                # After three deaths a document is blamed, also if it was there by chance.
                self._count("blamed" if allowed is WorkerCrashedError else "blamed by chance")
            elif allowed is not None and isinstance(error, allowed):
                self._count("timed out")
            else:
                self._note(self.unexplained, f"{error!r} for {query}, {len(documents)} documents")
                self._count("unexplained")
            return error
        if expected is None:
            self._note(self.unexplained, f"a poison document was scored: {query}")
        self._count(self._check(future.result(), query, documents, partial))
        return None

    def _check(self, results: list[RerankResult], query: str, documents: list[str], partial: bool) -> str:
        """Check results: all scores of one model, each of its document, best first, and none missing."""
        scored = [result for result in results if result.relevance_score is not None]
        complete = len(scored) == len(documents)
        problem = ""
        if sorted(result.index for result in results) != list(range(len(documents))):
            problem = "documents missing or doubled"
        elif not complete and not partial:
            problem = "unscored documents in a whole ranking"
        elif any(result.document != documents[result.index] for result in results):
            problem = "another document"
        elif not any(
            all(result.relevance_score == score_of(model + query, result.document) for result in scored)
            for model in MODELS
        ):
            problem = "scores of neither model, or of both"
        elif [r.relevance_score for r in scored] != sorted((r.relevance_score for r in scored), reverse=True):
            problem = "not best first"
        if problem:
            self._note(self.wrong, f"{problem}: {query}, {len(documents)} documents")
        with self.lock:
            self.pairs += len(scored)
        return "scored" if complete else "partly scored"

    def _count(self, outcome: str) -> None:
        with self.lock:
            self.outcomes[outcome] += 1

    def _note(self, where: list[str], text: str) -> None:
        with self.lock:
            where.append(text)

    # What is done to the pool meanwhile.

    def _killer(self, pool: RerankerPool, chance: random.Random) -> None:
        """Kill, stop and crash workers, whether they load, wait or score, and their template."""
        # A Dask worker takes ten times as long to come back as a process of the pool's.
        while not self.stop.wait(chance.random() * (6.0 if self.cluster is not None else 1.5)):
            if self.cluster is not None:
                self._harm_cluster(self.cluster, chance)
                continue
            pids = [info.pid for info in pool.workers() if info.pid is not None]
            if not pids:
                continue
            name = chance.choice(["SIGKILL", "SIGKILL", "SIGSEGV", "SIGTERM", "SIGSTOP"])
            try:
                process = psutil.Process(chance.choice(pids))
                above = process.parent()
                if above is None or os.getpid() not in (above.pid, above.ppid()):
                    continue  # another program's, by now
                if self.start_method == FORK_MODEL and above.pid != os.getpid() and chance.random() < TEMPLATES_SHARE:
                    process, name = above, f"{name} of a template"
                process.send_signal(getattr(signal, name.partition(" ")[0]))
                self.kills[name] += 1
            except psutil.Error:
                pass

    def _harm_cluster(self, cluster: Processes, chance: random.Random) -> None:
        """Do something to one of the Dask workers, or to its nanny: then another is started in its place."""
        number = chance.randrange(len(self.nannies))
        nanny = self.nannies[number]
        name = chance.choice(["SIGKILL", "SIGKILL", "SIGSEGV", "SIGSTOP", "nanny SIGKILL", "nanny SIGTERM"])
        if name.startswith("nanny"):
            nanny.send_signal(getattr(signal, name.split()[1]))  # SIGTERM: the worker finishes what it has
            self.nannies[number] = cluster.worker()
        else:
            workers = workers_of(nanny)
            if not workers:
                return
            try:
                workers[0].send_signal(getattr(signal, name))
            except psutil.NoSuchProcess:  # it has died of a document
                return
            if name == "SIGSTOP":
                threading.Timer(chance.random() * 2 * CLUSTER_TIMEOUT, _resume, workers).start()
        self.kills[name] += 1

    def _reloader(self, pool: RerankerPool, chance: random.Random) -> None:
        turn = 0
        while not self.stop.wait(3.0 + chance.random() * 7.0):
            turn += 1
            try:
                pool.reload(_spec(MODELS[turn % 2]))
            except ClusterError:  # every worker has left while it loaded
                turn -= 1


def _resume(process: psutil.Process) -> None:
    """Let a worker that was stopped go on."""
    try:
        process.resume()
    except psutil.NoSuchProcess:  # its nanny has ended it
        pass


def _is_adopted_zombie(process: psutil.Process) -> bool:
    """Whether it was a worker of a template that has died: elsewhere the system's first process waits for those."""
    try:
        return process.ppid() == os.getpid() and _adopting and process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return True


class _Footprint:
    """The children, threads, open files and memory of this process."""

    def __init__(self) -> None:
        gc.collect()
        process = psutil.Process()
        children = process.children(recursive=True)
        self.processes = sum(not _in_cluster(child) and not _is_adopted_zombie(child) for child in children)
        self.threads = threading.active_count()
        self.files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
        self.rss = process.memory_info().rss

    @classmethod
    def now(cls, until: _Footprint | None = None) -> _Footprint:
        """The footprint now; with ``until``, waits for it to shrink to that: threads take a moment to end."""
        deadline = time.monotonic() + 20.0
        while True:
            found = cls()
            within = until is not None and (
                found.processes <= until.processes and found.threads <= until.threads and found.files <= until.files
            )
            if until is None or within or time.monotonic() > deadline:
                return found
            time.sleep(0.1)


def _in_cluster(process: psutil.Process) -> bool:
    try:
        return CLUSTER_MARK in process.environ()
    except psutil.Error:
        return False


def _quantile(values: list[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))] if values else 0.0


def _spec(model: str) -> ModelSpec:
    return ModelSpec(f"{model}:{SECONDS_PER_TOKEN}", loader=PACED)


def _table(report: dict[str, Any]) -> str:
    lines = []
    for name, value in report.items():
        label = name.replace("_", " ")
        if isinstance(value, dict):
            lines.append(f"{label:<22} {sum(value.values()):>10,}")
            lines += [f"  {key:<20} {count:>10,}" for key, count in value.items()]
        elif isinstance(value, list):
            lines.append(f"{label:<22} {' -> '.join(str(item) for item in value)}")
        else:
            lines.append(f"{label:<22} {value:>10,}")
    lines.append("nothing lost" if not any(report[name] for name in FAULTS) else "NOT AS IT MUST BE")
    return "\n".join(lines)
