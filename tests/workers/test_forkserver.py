"""Workers forked by a server: it is started once, survives its children's deaths, and they survive its own.

What a pool promises is tested over them in ``test_contract``, that they leave with their parent in ``test_shutdown``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, ranked, until
from processes import command_line

from mp_rerank import RerankerPool

MakePool = Callable[..., RerankerPool]

DOCUMENTS = [f"document {i}" for i in range(50)]


@pytest.fixture
def forking(make_pool: MakePool, fork_server: str) -> Callable[..., RerankerPool]:
    def make(**options: object) -> RerankerPool:
        return make_pool(start_method=fork_server, **options).start()

    return make


def server_of(pool: RerankerPool) -> psutil.Process:
    (pid,) = {psutil.Process(worker.pid).ppid() for worker in pool.workers()}
    return psutil.Process(pid)


def test_one_server_forks_the_workers_of_every_pool(forking: Callable[..., RerankerPool]) -> None:
    first, second = forking(), forking(workers=1)
    assert server_of(first) == server_of(second)
    assert server_of(first).ppid() == os.getpid()
    first.close()
    assert second.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


def test_a_worker_that_dies_is_forked_anew_and_its_signal_is_told(forking: Callable[..., RerankerPool]) -> None:
    pool = forking(max_restarts=0, workers=1)
    server = server_of(pool)
    os.kill(pool.workers()[0].pid, signal.SIGSEGV)  # type: ignore[arg-type]
    until(lambda: pool.stats().crashes == 1)
    until(lambda: pool.workers()[0].state in ("ready", "failed"))
    with pytest.raises(Exception, match="SIGSEGV"):
        pool.rerank("query", DOCUMENTS)
    assert server.is_running()


def test_a_death_in_the_middle_loses_nothing(forking: Callable[..., RerankerPool]) -> None:
    pool = forking()
    for _ in range(5):
        futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
        for worker in pool.workers():
            if worker.pid is not None:
                with contextlib.suppress(psutil.NoSuchProcess):  # killed in the round before, as is to be noticed yet
                    psutil.Process(worker.pid).kill()
        assert [future.result() for future in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]


def test_a_server_that_dies_takes_nothing_along(forking: Callable[..., RerankerPool]) -> None:
    """Its children's exit codes are lost with it, so they pass for dead: they must then really be."""
    pool = forking()
    server, before = server_of(pool), [psutil.Process(worker.pid) for worker in pool.workers()]
    futures = [pool.submit(f"query {i}", DOCUMENTS) for i in range(20)]
    server.kill()
    assert [future.result() for future in futures] == [ranked(f"query {i}", DOCUMENTS) for i in range(20)]
    until(lambda: all(worker.state == "ready" and worker.generation == 2 for worker in pool.workers()))
    assert server_of(pool) != server
    _, alive = psutil.wait_procs(before, timeout=30)
    assert not alive


def test_a_server_that_is_stopped_is_told_to_go_on(
    forking: Callable[..., RerankerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would cost the pool its seats, and to end it would cost all pools their workers."""
    monkeypatch.setattr("mp_rerank._workers.forkserver.GIVE_UP_SECONDS", 0.01)
    pool = forking()
    server, before = server_of(pool), pool.workers()
    server.suspend()
    psutil.Process(before[0].pid).kill()
    until(lambda: pool.workers()[0].generation == 2 and pool.workers()[0].state == "ready")
    assert server_of(pool) == server
    assert pool.workers()[1].pid == before[1].pid
    assert pool.rerank("query", DOCUMENTS) == ranked("query", DOCUMENTS)


# A server that imports for a long time.

SLEEPING = """
import os, signal, sys, threading, time
from mp_rerank import ModelSpec, RerankerPool, RequestTimeoutError
FAKE = ModelSpec("fake", loader="fakes:load")
options = dict(devices="cpu", workers=1, start_method="forkserver", restart_backoff=0.01)

def say(*words):
    print(*words, flush=True)
"""

# Python runs it first of all in every process: in the server it holds an import up while the file is there.
SITECUSTOMIZE = """
import os, sys, time

class Sleeping:
    def find_spec(self, name, path=None, target=None):
        while name == "mp_rerank._engine.engine" and os.path.exists(os.environ["ASLEEP"]):
            time.sleep(0.01)

if "forkserver" in " ".join(sys.orig_argv):
    sys.meta_path.insert(0, Sleeping())
"""


class Program:
    """A program whose server's imports sleep for as long as the file ``asleep`` is there."""

    def __init__(self, directory: Path, text: str) -> None:
        self.asleep = directory / "asleep"
        self.asleep.touch()
        (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
        tests = Path(__file__).parents[1]
        path = os.pathsep.join(str(p) for p in (directory, tests, tests.parent))
        self.process = subprocess.Popen(
            [sys.executable, "-c", SLEEPING + text],
            env={**os.environ, "PYTHONPATH": path, "ASLEEP": str(self.asleep)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def server(self, *, importing: bool = True) -> psutil.Process:
        """The server; while it imports, it has a second thread, which watches."""
        found: list[psutil.Process] = []

        def look() -> bool:
            children = psutil.Process(self.process.pid).children()
            found[:] = [child for child in children if "forkserver" in command_line(child)]
            return bool(found) and (found[0].num_threads() > 1 or not importing)

        until(look)
        return found[0]

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[[str], Program]]:
    pytest.importorskip("mp_rerank._workers.forkserver", exc_type=ImportError)
    programs: list[Program] = []

    def start(text: str) -> Program:
        programs.append(Program(tmp_path, text))
        return programs[-1]

    yield start
    for started in programs:
        started.end()


def test_start_timeout_covers_the_imports_of_the_server(program: Callable[[str], Program]) -> None:
    running = program(
        """
start = time.monotonic()
try:
    RerankerPool(FAKE, start_timeout=0.5, max_restarts=1, **options).start()
except Exception as error:
    say(type(error).__name__, error, time.monotonic() - start < 5)
"""
    )
    said = running.read()
    assert "WorkerCrashedError 2 workers in a row ended on cpu" in said
    assert said.endswith("hung and was killed True")
    assert running.process.wait(PATIENCE) == 0


def test_ctrl_c_while_the_server_imports(program: Callable[[str], Program]) -> None:
    running = program(
        """
try:
    RerankerPool(FAKE, **options).start()
except KeyboardInterrupt:
    say("interrupted")
"""
    )
    server = running.server()
    running.process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert running.read() == "interrupted"
    assert time.monotonic() - start < 3
    assert running.process.wait(PATIENCE) == 0
    until(lambda: not server.is_running())


def test_the_server_ends_with_a_killed_parent_while_it_imports(program: Callable[[str], Program]) -> None:
    running = program("RerankerPool(FAKE, **options).start()")
    server = running.server()
    running.process.kill()
    _, alive = psutil.wait_procs([server], timeout=20)
    assert not alive


def test_deadlines_are_kept_while_a_new_server_imports(program: Callable[[str], Program]) -> None:
    """The old one was killed, and took its worker along."""
    running = program(
        """
pool = RerankerPool(FAKE, **options).start()
say(pool.workers()[0].pid)
sys.stdin.readline()
start = time.monotonic()
try:
    pool.submit("query", ["document"], timeout=0.5).result()
except RequestTimeoutError:
    say("in time", time.monotonic() - start < 1.5)
sys.stdin.readline()
say(len(pool.rerank("query", ["document"] * 3)))
pool.close()
"""
    )
    running.asleep.unlink()
    worker = psutil.Process(int(running.read()))
    server = worker.parent()
    assert server is not None
    running.asleep.touch()
    server.kill()
    psutil.wait_procs([worker], timeout=20)
    running.go_on()
    assert running.read() == "in time True"
    running.asleep.unlink()
    running.go_on()
    assert running.read() == "3"
    assert running.process.wait(PATIENCE) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_fork_of_the_program_keeps_no_server_alive(program: Callable[[str], Program]) -> None:
    running = program(
        """
pool = RerankerPool(FAKE, **options).start()
fork = os.fork()
if fork == 0:
    time.sleep(60)
    os._exit(0)
say(fork)
time.sleep(60)
"""
    )
    running.asleep.unlink()
    fork = psutil.Process(int(running.read()))
    server = running.server(importing=False)
    running.process.kill()
    try:
        _, alive = psutil.wait_procs([server], timeout=20)
        assert not alive
        assert fork.is_running()
    finally:
        fork.kill()
