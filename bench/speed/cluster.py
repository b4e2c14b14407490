"""`python -m bench cluster`: what it costs that a worker is Dask's and not the pool's own process. Needs no torch.

The cluster is one of this machine: a scheduler and workers, each a process, whose models compute nothing or sleep.

*A slice*: the time of a request of 32 documents of 2,400 bytes, one slice, until its result is back: from a process of
the pool's own, from a Dask worker directly, through the scheduler (as behind a gateway), and as a task of Dask's. The
ways take turns.

*Seats*: 1 to 32 workers, whose model sleeps for a fixed time a slice of as many bytes. Measured are the share of time
in which they are in use, the CPU time of the caller's process for each slice, and that of a worker with its nanny.

*Bytes*: what the connections of the caller's process carry, for each pair.

*Where it ends*: a slice costs the caller's process some CPU time, and the scheduler too where it hands slices on. So
there is a number of seats beyond which more of them do not help. It is what a model says (the smaller of the seats'
rate and that of whatever each slice must pass), and a simulation of every slice.
"""

from __future__ import annotations

import argparse
import heapq
import pickle
import re
import statistics
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.inputs import fakes
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from bench.speed.scale import cpu_seconds, kept_busy
from mp_rerank import ModelSpec, RerankerPool
from mp_rerank._workers import dask

DOCUMENTS, BYTES = 32, 2_400
# For the bytes a pair: documents of 20, 60 and 300 words.
SIZES = (120, 360, 1_800)
SIMULATED = (1, 4, 16, 64, 256, 1_024, 4_096)
START_SECONDS = 300.0
# Dask's workers watch themselves: an idle one takes 2.5 % of a core as it comes, less with these. 32 are on few cores.
QUIET = {
    "DASK_DISTRIBUTED__ADMIN__SYSTEM_MONITOR__INTERVAL": "10s",
    "DASK_DISTRIBUTED__ADMIN__TICK__INTERVAL": "1s",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
}


def main(argv: Sequence[str]) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seats", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--milliseconds", type=float, default=300.0, help="that a slice takes (default 300)")
    parser.add_argument("--slices", type=int, default=12, help="slices a seat and round (default 12)")
    parser.add_argument("--requests", type=int, default=200, help="timed for each way and round (default 200)")
    parser.add_argument("--rounds", type=int, default=3)
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("cluster", "Dask cluster", options)
    with tempfile.TemporaryDirectory() as folder:
        cluster = fakes.Processes(Path(folder))
        try:
            started = grow(cluster, 0, 1)
            a_slice(report, cluster, options.requests, options.rounds)
            for size in SIZES:
                a_pair(report, cluster, size)
            through = cost_through_scheduler(cluster, options.requests)
            direct = {}
            for count in sorted(options.seats):
                started = grow(cluster, started, count)
                direct[count] = seats(
                    report, cluster, count, options.milliseconds / 1000, options.slices, options.rounds
                )
        finally:
            cluster.close()
    if direct:
        where_it_ends(report, options.milliseconds / 1000, direct[max(direct)], *through)
    finish(report, options.out)
    return 0


def grow(cluster: fakes.Processes, now: int, count: int) -> int:
    """Let the cluster have ``count`` workers; returns that."""
    if count > now:
        cluster.worker("--nworkers", str(count - now), **QUIET)
        cluster.wait_for(count, START_SECONDS)
    return count


def pool_of(model: ModelSpec, **options: Any) -> RerankerPool:
    """A pool that scores every pair, a request in one slice or a pair in one."""
    return RerankerPool(model, devices="cpu", threads_per_worker=1, coalesce=False, **options)


def text(number: int, size: int) -> str:
    """A document of ``size`` bytes, another one for each number."""
    return f"{number} ".ljust(size, "x").replace("xxxxx", "word ")


@contextmanager
def no_way_but_the_scheduler() -> Iterator[None]:
    """As where a gateway lets nothing through to the workers."""
    connect = dask.Cluster.connect

    async def blocked(self: dask.Cluster, address: str) -> Any:
        if address != self._address:
            raise OSError("no route to host")
        return await connect(self, address)

    dask.Cluster.connect = blocked  # type: ignore[method-assign]
    try:
        yield
    finally:
        dask.Cluster.connect = connect  # type: ignore[method-assign]


def a_slice(report: Report, cluster: fakes.Processes, requests: int, rounds: int) -> None:
    """Time one slice after the other on an idle worker, by each way."""
    from distributed import Client

    documents = [text(i, BYTES) for i in range(DOCUMENTS)]
    pairs = [("a query", document) for document in documents]
    model = ModelSpec("empty", loader=fakes.EMPTY)
    one = {"slice_tokens": 10**6}
    with (
        pool_of(model, workers=1, **one) as local,
        pool_of(model, cluster=cluster.address, **one) as direct,
        Client(cluster.address, set_as_default=False) as client,
    ):
        with no_way_but_the_scheduler():
            relayed = pool_of(model, cluster=cluster.address, **one).start()
        ways: dict[str, Callable[[], object]] = {
            "a process of the pool's (mp_rerank)": lambda: local.submit_pairs(pairs).result(),
            "Dask worker, directly (mp_rerank)": lambda: direct.submit_pairs(pairs).result(),
            "Dask worker, through the scheduler (mp_rerank)": lambda: relayed.submit_pairs(pairs).result(),
            "a task of Dask's": lambda: client.submit(len, pickle.dumps(pairs), pure=False).result(),
        }
        times: dict[str, list[list[float]]] = {way: [[] for _ in range(rounds)] for way in ways}
        with no_way_but_the_scheduler():  # the direct pool has its connections
            for number in range(-10, rounds * requests):
                for way, call in ways.items():
                    start = time.perf_counter()
                    call()
                    if number >= 0:
                        times[way][number // requests].append(1e3 * (time.perf_counter() - start))
            relayed.close()
    first = times[next(iter(times))]
    for way, of_rounds in times.items():
        of = {"way": way}
        report.add(of, "p50, ms", [statistics.median(found) for found in of_rounds])
        report.add(of, "p99, ms", [sorted(found)[int(0.99 * len(found))] for found in of_rounds])
        over = [statistics.median(a) - statistics.median(b) for a, b in zip(of_rounds, first, strict=True)]
        report.add(of, "over a process of the pool's, ms", over)
        print(f"{way}: {statistics.median(map(statistics.median, of_rounds)):.2f} ms", flush=True)


def a_pair(report: Report, cluster: fakes.Processes, size: int) -> None:
    """Count bytes of a request of many documents of one size."""
    count = 20 * DOCUMENTS
    with pool_of(ModelSpec("empty", loader=fakes.EMPTY), cluster=cluster.address) as pool:
        pool.rerank("how many people live there?", ["a document"])
        before = carried()
        pool.rerank("how many people live there?", [text(i, size) for i in range(count)])
        after = carried()
    if before is not None and after is not None:
        of = {"document, bytes": size}
        report.add(of, "to the worker, bytes a pair", (after[0] - before[0]) / count)
        report.add(of, "back, bytes a pair", (after[1] - before[1]) / count)


def carried() -> tuple[int, int] | None:
    """Bytes that this process's TCP connections have sent and received; ``None`` where nobody counts them."""
    try:
        listed = subprocess.run(["ss", "-tinH"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    ours = {connection.laddr.port for connection in psutil.Process().net_connections("tcp")}
    sent = received = 0
    for socket, counts in zip(listed.splitlines()[::2], listed.splitlines()[1::2], strict=False):
        if int(socket.split()[3].rpartition(":")[2]) in ours:
            sent += int((re.search(r"bytes_sent:(\d+)", counts) or [0, 0])[1])
            received += int((re.search(r"bytes_received:(\d+)", counts) or [0, 0])[1])
    return sent, received


def seats(report: Report, cluster: fakes.Processes, count: int, seconds: float, slices: int, rounds: int) -> float:
    """Give ``count`` seats all the slices that they can take; the CPU seconds of this process for each."""
    sleeping = ModelSpec(str(seconds), loader=fakes.SLEEPING)
    document = "word " * (DOCUMENTS * BYTES // 5)
    with pool_of(sleeping, cluster=cluster.address, cluster_timeout=START_SECONDS, slice_tokens=1) as pool:
        while len([info for info in pool.workers() if info.state == "ready"]) < count:
            time.sleep(0.1)
        kept_busy(pool, count, 3, document)
        efficiency, own, theirs = [], [], []
        for _ in range(rounds):
            began = time.process_time(), cpu_of_workers(cluster)
            wall = kept_busy(pool, count, slices, document)
            efficiency.append(100 * slices * seconds / wall)
            own.append(1e6 * (time.process_time() - began[0]) / (count * slices))
            theirs.append(100 * (cpu_of_workers(cluster) - began[1]) / wall / count)
    of = {"seats": count}
    report.add(of, "efficiency, %", efficiency, better="higher")
    report.add(of, "CPU of the caller's process, µs a slice", own)
    report.add(of, "CPU of a Dask worker, % of a core", theirs)
    print(f"{count} seats: {statistics.median(efficiency):.1f} %", flush=True)
    return statistics.median(own) / 1e6


def cpu_of_workers(cluster: fakes.Processes) -> float:
    """CPU seconds that the cluster's workers, and their nannies, have used."""
    nannies = [psutil.Process(started.pid) for started in cluster.started if started is not cluster.scheduler]
    return sum(map(cpu_seconds, (process for nanny in nannies for process in (nanny, *nanny.children(recursive=True)))))


def cost_through_scheduler(cluster: fakes.Processes, requests: int) -> tuple[float, float]:
    """CPU seconds of this process, and of the scheduler, for a slice that goes through the latter."""
    scheduler = psutil.Process(cluster.scheduler.pid)
    pairs = [("a query", "word " * (DOCUMENTS * BYTES // 5))]
    model = ModelSpec("empty", loader=fakes.EMPTY)
    with no_way_but_the_scheduler(), pool_of(model, cluster=cluster.address, slice_tokens=1) as pool:
        pool.submit_pairs(pairs).result()
        before = cpu_seconds(scheduler), time.process_time()
        waiting = deque(pool.submit_pairs(pairs) for _ in range(requests))
        while waiting:
            waiting.popleft().result()
        theirs, own = cpu_seconds(scheduler) - before[0], time.process_time() - before[1]
    return own / requests, theirs / requests


def where_it_ends(report: Report, seconds: float, direct: float, own: float, scheduler: float) -> None:
    """The model and the simulation, from what a slice costs this process, and the scheduler."""
    ways = {"directly": direct, "through the scheduler": max(own, scheduler)}
    for way, cost in ways.items():
        of: dict[str, Any] = {"slices go": way}
        report.add(of, "CPU of what each slice must pass, ms", 1e3 * cost)
        report.add(of, "slices/s at most", 1 / cost, better="higher")
        report.add(of, "pairs/s at most, 32 a slice", DOCUMENTS / cost, better="higher")
        report.add(of, f"seats at most, {seconds:g} s a slice", seconds / cost, better="higher")
    for way, cost in ways.items():
        for count in SIMULATED:
            of = {"slices go": way, "seats": count}
            report.add(of, "slices/s, by the model", min(count / seconds, 1 / cost), better="higher")
            report.add(of, "slices/s, simulated", simulated(count, seconds, cost), better="higher")


def simulated(count: int, seconds: float, cost: float, slices: int = 12, flight: float = 0.0005) -> float:
    """Slices a second of ``count`` seats with two slices each.

    Args:
        count: of seats.
        seconds: that a seat takes for a slice.
        cost: seconds that what every slice must pass takes for one; it takes one at a time, first come, first served.
        slices: that each seat scores.
        flight: seconds on the way from there to the seat, and back.
    """
    free_at = [0.0] * count  # each seat
    passes_at = 0.0  # when what all must pass is free
    left = count * slices
    ready = [(0.0, number, number % count) for number in range(2 * count)]  # slices, when they may pass, for which seat
    done = 0.0
    number = 2 * count
    sent = 0
    while ready:
        now, _, seat = heapq.heappop(ready)
        if sent == left:
            continue
        sent += 1
        passes_at = max(now, passes_at) + cost
        free_at[seat] = max(passes_at + flight, free_at[seat]) + seconds
        done = max(done, free_at[seat])
        number += 1
        heapq.heappush(ready, (free_at[seat] + flight, number, seat))
    return left / done
