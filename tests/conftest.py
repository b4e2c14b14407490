"""What every test gets: pools of the fake model, and the certainty that nothing is left behind."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import CLUSTER_MARK, Processes, need_dask
from fakes import scores_of
from processes import command_line

from mp_rerank import ModelSpec, RerankerPool, RerankResult, connect, shared

FAKE = ModelSpec("fake", loader="fakes:load")

# Those of every POSIX system, and of this one.
START_METHODS = ["spawn", "forkserver", *(["fork-model"] if sys.platform.startswith("linux") else [])]

# Long enough for a loaded machine, short enough that a hang is a failed test.
PATIENCE = 60.0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cross-encoder-device",
        default=os.environ.get("TEST_CROSS_ENCODER_DEVICE", "cpu"),
        help="device of the real models' pools, and of the CrossEncoder they are held against",
    )
    parser.addoption(
        "--start-method",
        choices=START_METHODS,
        help="how the fake model's pools start their workers, where a test does not say (by default: see SPAWNED)",
    )


def pytest_configure() -> None:
    # The models that pools are held against are in this process; some have torch compile them, in helpers that stay.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["MP_RERANK_TUNED"] = "0"  # pools are what their tests say, whatever was measured on this machine
    # A shell's background job ignores Ctrl-C, and so would every process that the tests start and interrupt.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Scheduling, processes, plans, and what callers see: all that the interpreter makes a difference to.
CORE = (
    *("scheduling/", "workers/", "planning/"),
    *(f"public/test_{name}.py" for name in ("cli", "config", "contract", "imports", "inputs")),
)


# Where it matters how a worker starts and ends: there they are spawned, as they are by default.
SPAWNED = ("workers/", *(f"scheduling/test_{name}.py" for name in ("crashes", "exits", "hangs_and_deadlines", "idle")))


def where(item: pytest.Item) -> str:
    """The file of a test, as in ``CORE``."""
    return item.path.relative_to(Path(__file__).parent).as_posix()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if where(item).startswith(CORE) and item.get_closest_marker("real") is None:
            item.add_marker("core")


def pytest_collection_finish() -> None:
    gc.freeze()  # every test collects garbage; what the libraries hold, a quarter of a second's walk, is none
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # tiny models, which pools are held against: two threads mostly wait


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """The device real models are tested on."""
    return str(request.config.getoption("--cross-encoder-device"))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[str]:
    """Keeps the fork server, and with it what it has imported, from test to test; the start method's name."""
    forkserver = pytest.importorskip("mp_rerank._workers.forkserver", exc_type=ImportError)
    forkserver.lease()
    yield "forkserver"
    forkserver.release()


@pytest.fixture(scope="session")
def dask_clusters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, str]]:
    """The addresses of two Dask clusters, by the number of their workers: 1 and 2."""
    need_dask()
    clusters = {count: Processes(tmp_path_factory.mktemp("cluster")) for count in (1, 2)}
    for count, cluster in clusters.items():
        cluster.worker("--nworkers", str(count))
    yield {count: cluster.address for count, cluster in clusters.items()}
    for cluster in clusters.values():
        cluster.close()


@pytest.fixture
def make_pool(request: pytest.FixtureRequest) -> Iterator[Callable[..., RerankerPool]]:
    """Makes pools, of the fake model unless another is named, and closes them when the test ends.

    Most are forked: a new process and its imports for each worker of each test would take most of the time.
    With ``over="http"`` it is a client, of a server of its own.
    """
    pools: list[Any] = []
    servers = ExitStack()
    start_method = request.config.getoption("--start-method")
    if request.node.get_closest_marker("real") or not (start_method or where(request.node).startswith(SPAWNED)):
        start_method = request.getfixturevalue("fork_server")

    def make(model: str | ModelSpec = FAKE, **options: Any) -> RerankerPool:
        options.setdefault("devices", "cpu")
        if options.get("isolation") != "thread" and "cluster" not in options:
            options.setdefault("workers", 2)
        options.setdefault("restart_backoff", 0.01)
        options.setdefault("start_method", start_method or "spawn")
        if options.pop("over", None) == "http":
            from serving import serving

            spec = model if isinstance(model, ModelSpec) else ModelSpec(model)
            pool: Any = connect(servers.enter_context(serving({spec.name: spec}, options)).url)
        else:
            pool = RerankerPool(model, **options)
        pools.append(pool)
        return pool

    yield make
    for pool in pools:
        pool.close(drain=False)
    servers.close()


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A registry of shared pools of the test's own, whose pools end with it."""
    places: dict[Any, Any] = {}
    monkeypatch.setattr(shared, "_places", places)
    yield
    for place in places.values():
        while place is not None:
            place.pool.close(drain=False)
            place = place.follower


@contextmanager
def one_cpu() -> Iterator[None]:
    """What is started within has one CPU, and so one worker a pool: each of them imports torch, which takes seconds."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {random.choice(sorted(cpus))})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what gives no sign when it happens."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def ranked(query: str, documents: list[str]) -> list[RerankResult]:
    """What the fake model's pool is to return for them."""
    scores = scores_of(query, documents)
    order = sorted(range(len(documents)), key=lambda i: -scores[i])
    return [RerankResult(i, scores[i], documents[i]) for i in order]


def kill(pool: RerankerPool, seat: int) -> None:
    """Kill the worker of ``seat``, and the template it was forked by, if one was: the next worker loads the model."""
    worker = psutil.Process(pool.workers()[seat].pid)
    if worker.ppid() in [template.pid for template in pool.memory().templates]:
        psutil.Process(worker.ppid()).kill()
    worker.kill()


class Fifo:
    """A gate a fake model stops at: ``order`` is the document that makes it."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.order = f"!read {path}"
        self._path = path
        self._writer: FileIO | None = None

    def wait_until_read(self) -> None:
        """Return once the model stands at the gate."""
        self._writer = self._path.open("wb", buffering=0)  # blocks until there is a reader

    @property
    def pid(self) -> int:
        """The process of the model that stands, or last stood, at the gate."""
        return int(self._path.with_suffix(".pid").read_text())

    def release(self) -> None:
        """Let it pass."""
        assert self._writer is not None
        self._writer.close()

    def let_pass(self) -> None:
        """Let a model pass that stands at the gate now, if one does."""
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            if error.errno != errno.ENXIO:  # nobody reads
                raise

    def close(self) -> None:
        """Let it pass if a test that failed has not: what the next test finds is not its fault."""
        if self._writer is not None:
            self._writer.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Iterator[Fifo]:
    fifo = Fifo(tmp_path / "gate")
    yield fifo
    fifo.close()


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch, and the kernels with it, compute with so many threads."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _plans_are_of_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans made in this process are those for a CPU without AMX, whichever the tests run on."""
    monkeypatch.setattr("mp_rerank._planning.plan.has_amx", lambda: False)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """No worker process and no thread of a pool outlives the test that started it; a module's own pool may."""
    before = set(psutil.Process().children(recursive=True))
    threads_before = set(threading.enumerate())
    yield
    gc.collect()

    def stuck() -> list[threading.Thread]:  # not joined: one that is just being started cannot be
        ours = ("mp_rerank", "QueueFeederThread")
        old = [*threads_before, *(t for t in threading.enumerate() if t.name == "mp_rerank-server")]  # as in ``stays``
        return [t for t in threading.enumerate() if t.name.startswith(ours) and t not in old]

    deadline = time.monotonic() + PATIENCE
    while stuck() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not stuck(), f"threads left behind: {stuck()}"
    left = [child for child in psutil.Process().children(recursive=True) if child not in before and not stays(child)]
    _, alive = psutil.wait_procs(left, timeout=PATIENCE)
    assert not alive, f"processes left behind: {[(process, command_line(process)) for process in alive]}"


def stays(process: psutil.Process) -> bool:
    """Whether it is none of ours: multiprocessing's tracker, the tests' fork server, or of their Dask clusters."""
    try:
        if CLUSTER_MARK in process.environ():
            return True
        line = command_line(process)
        return "resource_tracker" in line or ("forkserver" in line and process.ppid() == os.getpid())
    except psutil.Error:
        return False
