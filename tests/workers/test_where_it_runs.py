"""Surroundings that a program brings along: closed descriptors, signals, a directory that is gone, greenlets, and more.

Each case is a script in a process of its own. A worker is right there, or the error says what to do.
"""

from __future__ import annotations

import itertools
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, START_METHODS, until
from processes import command_line

from mp_rerank import RerankerPool

TESTS = Path(__file__).parents[1]
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
posix = pytest.mark.skipif(os.name != "posix", reason="of POSIX systems")

PRELUDE = """
import os, signal, sys, threading, time
from mp_rerank import ModelSpec, RerankerPool

START_METHOD = os.environ.get("START_METHOD", "spawn")

def make(**options):
    options = {"devices": "cpu", "workers": 1, "restart_backoff": 0.01, "start_method": START_METHOD, **options}
    return RerankerPool(ModelSpec("fake", loader="fakes:load"), **options)
"""

SCORING = """
with make() as pool:
    scored = len(pool.rerank("query", ["a", "b", "c"]))
with open(os.environ["RESULT"], "w") as result:
    result.write(str(scored))
"""


def run(
    program: str,
    *,
    cwd: Path | None = None,
    options: tuple[str, ...] = (),
    prepare: Callable[[], None] | None = None,
    prelude: str = PRELUDE,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return subprocess.run(
        [sys.executable, *options, "-c", prelude + program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=cwd,
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


# Descriptors.


@posix
@pytest.mark.parametrize("closed", [c for n in (1, 2, 3) for c in itertools.combinations(range(3), n)])
def test_closed_standard_descriptors(closed: tuple[int, ...], tmp_path: Path) -> None:
    """As under ``>&-``: the pipes of a launch must not take their numbers, onto which workers redirect their output."""
    result = tmp_path / "result"
    program = f"for fd in {closed}: os.close(fd)\n{SCORING}"
    done = run(program, RESULT=str(result))
    assert result.exists(), done.stderr
    assert result.read_text() == "3"


@posix
def test_closed_standard_descriptors_stay_closed(tmp_path: Path) -> None:
    """What the program closed is its own to open again."""
    result = tmp_path / "result"
    program = f"""
os.close(0)
os.close(1)
pool = make().start()
opened = os.pipe()
pool.close()
with open({str(result)!r}, "w") as file:
    print(*opened, file=file)
"""
    done = run(program)
    assert result.exists(), done.stderr
    assert result.read_text() == "0 1\n"


@posix
def test_closed_standard_descriptors_and_a_fork_server(tmp_path: Path) -> None:
    result = tmp_path / "result"
    done = run("os.close(0); os.close(1)\n" + SCORING, RESULT=str(result), START_METHOD="forkserver")
    assert result.exists(), done.stderr


# Signals.


@posix
@pytest.mark.parametrize("start_method", START_METHODS)
def test_sigpipe_turned_on_again_does_not_end_the_program(start_method: str) -> None:
    """The usual recipe for ``| head``: writing to a worker that is dead is an error for us, no end for the program."""
    program = """
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
pool = make(max_attempts=20, max_restarts=100).start()
large = ["document " * 40_000] * 4  # more than a pipe holds: it is being written when its reader dies
for generation in (1, 2, 3):
    while (worker := pool.workers()[0]).generation < generation or worker.state != "ready":
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGSTOP)
    future = pool.submit("query", large)
    time.sleep(0.2)
    os.kill(worker.pid, signal.SIGKILL)
    print(len(future.result()), flush=True)
print(signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)
pool.close()
"""
    done = run(program, START_METHOD=start_method)
    assert (done.returncode, done.stdout) == (0, "4\n4\n4\nTrue set()\n"), done.stderr


@posix
def test_a_worker_has_no_signal_blocked_but_ctrl_c() -> None:
    """What the launching thread blocks for itself is not for the programs that a model may start."""
    program = """
with make() as pool:
    print(open(f"/proc/{pool.workers()[0].pid}/status").read().split("SigBlk:")[1].split()[0])
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    blocked = int(run(program).stdout, 16)
    assert not blocked & ~(1 << (signal.SIGINT - 1))


# The current directory.


@posix
@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_deleted_directory(when: str, start_method: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    delete = "os.rmdir(os.getcwd())"
    program = f"""
{delete if when == "before" else ""}
with make() as pool:
    {delete if when == "after" else ""}
    os.kill(pool.workers()[0].pid, signal.SIGKILL)
    while pool.workers()[0].generation == 1:
        time.sleep(0.01)
    print(len(pool.rerank("query", ["a", "b", "c"])))
"""
    done = run(program, cwd=gone, START_METHOD=start_method)
    assert done.stdout == "3\n", done.stderr


@posix
def test_workers_are_in_the_program_s_directory(tmp_path: Path) -> None:
    if not Path("/proc/self/cwd").exists():
        pytest.skip("no /proc")
    program = """
os.chdir(os.environ["THERE"])
for method in ("spawn", "forkserver"):
    with make(start_method=method) as pool:
        print(os.readlink(f"/proc/{pool.workers()[0].pid}/cwd"))
"""
    there = tmp_path / "there"
    there.mkdir()
    assert run(program, THERE=str(there)).stdout == f"{there.resolve()}\n" * 2


# Greenlets.

GREEN = """
from gevent import monkey
monkey.patch_all({})
import gevent
beats = []
def beat():
    while True:
        beats.append(1)
        gevent.sleep(0.01)
beating = gevent.spawn(beat)
pool = make(workers=2).start()
asking = [gevent.spawn(pool.rerank, f"query {{i}}", ["document"] * 50) for i in range(20)]
gevent.joinall(asking)
print([len(asked.value or ()) for asked in asking] == [50] * 20)
print(len(list(pool.stream("query", ["document"] * 50))))
os.kill(pool.workers()[0].pid, signal.SIGKILL)
print(len(pool.rerank("query", [f"document {{i}}" for i in range(500)])))
while pool.workers()[0].generation == 1 or pool.workers()[0].state != "ready":
    gevent.sleep(0.01)
pool.close()
beating.kill()
print(len(beats) > 5 or {})
"""


@pytest.mark.parametrize("start_method", START_METHODS)
@pytest.mark.parametrize("patched", ["", "thread=False", "queue=False", "os=False, signal=False", "select=False"])
def test_gevent(patched: str, start_method: str) -> None:
    """Greenlets that ask, a worker that dies, other greenlets meanwhile; or an error that says what to do."""
    pytest.importorskip("gevent")
    program = GREEN.format(patched, "thread" in patched)
    # Patched first of all, as gunicorn and Celery do.
    patch, rest = program.split("import gevent\n")
    done = run(PRELUDE + "import gevent\n" + rest, prelude=patch, START_METHOD=start_method)
    if patched == "select=False":
        assert "RuntimeError: a RerankerPool cannot be started here: threads are greenlets" in done.stderr
        assert "monkey.patch_all() of gevent before anything else is imported" in done.stderr
    else:
        assert done.stdout == "True\n50\n500\nTrue\n", done.stderr


def test_gevent_and_a_worker_on_a_thread() -> None:
    pytest.importorskip("gevent")
    for patched in ("", "thread=False"):
        program = """
with RerankerPool(ModelSpec("fake", loader="fakes:load"), isolation="thread") as pool:
    futures = [pool.submit(f"query {i}", ["document"] * 50) for i in range(20)]
    time.sleep(0.05)
    futures += [pool.submit(f"query {i}", ["document"] * 50) for i in range(20)]
    print({len(future.result()) for future in futures})
"""
        done = run(PRELUDE + program, prelude=f"from gevent import monkey; monkey.patch_all({patched})\n")
        assert done.stdout == "{50}\n", (patched, done.stderr)


def test_gevent_s_patch_that_comes_too_late_is_an_error_at_once() -> None:
    """What multiprocessing had taken before is not replaced: it would wait for all greenlets, for ever."""
    pytest.importorskip("gevent")
    program = """
import selectors
from multiprocessing import connection
class Native(selectors.PollSelector):
    pass
native = connection._WaitSelector
import select
poll = select.poll
from gevent import monkey
monkey.patch_all()
class Old(native):
    _selector_cls = staticmethod(poll)
connection._WaitSelector = Old  # as one has it who took a copy
make().start()
"""
    done = run(program)
    assert "RuntimeError: a RerankerPool cannot be started here: threads are greenlets" in done.stderr


def test_eventlet() -> None:
    pytest.importorskip("eventlet")
    patch = "import eventlet; eventlet.monkey_patch({})\n"
    assert (
        "RuntimeError: a RerankerPool cannot be started here"
        in run(PRELUDE + "make().start()", prelude=patch.format("")).stderr
    )
    program = PRELUDE + "with make() as pool: print(len(pool.rerank('query', ['a', 'b'])))"
    assert run(program, prelude=patch.format("thread=False"), PYTHONWARNINGS="ignore").stdout == "2\n"


# No worker can be started.


@posix
def test_no_semaphores_are_an_error_at_once(
    make_pool: Callable[..., RerankerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    import _multiprocessing

    def refuse(*args: object) -> object:
        raise OSError(38, "Function not implemented")

    refuse.SEM_VALUE_MAX = 1  # type: ignore[attr-defined]
    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    with pytest.raises(RuntimeError, match=r'no semaphores.*Errno 38.*/dev/shm.*isolation="thread"'):
        make_pool().start()
    with make_pool(isolation="thread") as pool:
        assert len(pool.rerank("query", ["a", "b"])) == 2


@posix
def test_a_launch_that_cannot_work_is_tried_once(tmp_path: Path) -> None:
    """And says which error it was, with the traceback in the log at DEBUG."""
    program = """
import logging, multiprocessing
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
multiprocessing.set_executable(os.environ["EXECUTABLE"])
start = time.monotonic()
try:
    make(restart_backoff=5.0).start()
except Exception as error:
    print(type(error).__name__, error)
print("at once", time.monotonic() - start < 5)
"""
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    for mode in (0o644, 0o755):
        broken.chmod(mode)
        done = run(program, EXECUTABLE=str(broken))
        assert "WorkerCrashedError the worker on cpu could not be launched: " in done.stdout, done.stdout + done.stderr
        assert "ended before it had begun" in done.stdout
        assert str(broken) in done.stdout
        assert "at once True" in done.stdout


def test_an_error_of_a_launch_names_its_type(
    make_pool: Callable[..., RerankerPool], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mp_rerank._workers import launching

    def refuse(process: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(launching._WorkerProcess, "_Popen", staticmethod(refuse))
    caplog.set_level("DEBUG", "mp_rerank")
    pool = make_pool(restart_backoff=5.0)
    with pytest.raises(Exception, match=r"could not be launched: PermissionError: \[Errno 13\] Permission denied"):
        pool.start()
    until(lambda: "in refuse" in caplog.text)  # a log handler runs on a thread of its own


FROZEN = """
import os, sys
sys.frozen = True
sys.executable = sys.argv.pop(1)
with open(os.environ["RUNS"], "a+") as runs:
    print(*sys.argv[1:], file=runs, flush=True)
    runs.seek(0)
    if len(runs.readlines()) > 20:
        os._exit(1)  # a storm, if what keeps it away is broken, ends here
import multiprocessing.spawn
multiprocessing.set_executable(sys.executable)
if os.environ.get("AWARE"):
    multiprocessing.spawn.freeze_support()  # which is multiprocessing's own on Windows, and what bundlers put there
    if "-c" in sys.argv:  # they do this for the tracker
        exec(sys.argv[sys.argv.index("-c") + 1])
        sys.exit()
from mp_rerank import ModelSpec, RerankerPool
with RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1) as pool:
    print(len(pool.rerank("query", ["a", "b", "c"])))
"""


@posix
@pytest.mark.parametrize("aware", [True, False])
def test_a_frozen_program(aware: bool, tmp_path: Path) -> None:
    """Its executable runs the program again, whatever multiprocessing asks of it, unless it has freeze_support()."""
    script, program, runs = tmp_path / "main.py", tmp_path / "program", tmp_path / "runs"
    script.write_text(FROZEN)
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} {program} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "RUNS": str(runs)}
    if aware:
        environment["AWARE"] = "yes"
    done = subprocess.run([program], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    if aware:
        assert done.stdout == "3\n", done.stderr
        return
    errors = [line for line in done.stderr.splitlines() if line.startswith("mp_rerank.errors.WorkerCrashedError")]
    assert len(errors) == 1
    assert "could not be launched" in errors[0]
    assert "multiprocessing.freeze_support()" in errors[0]
    assert "begun like any other" in done.stderr, "which the helpers say"
    assert len(runs.read_text().splitlines()) <= 6, "no storm"


# The end of the parent.


@linux
@pytest.mark.parametrize("start_method", START_METHODS)
def test_stopped_workers_end_with_a_killed_parent(start_method: str) -> None:
    """A process that is stopped can look at nothing: the system must kill it."""
    program = """
pool = make(workers=2).start()
print(*[worker.pid for worker in pool.workers()], flush=True)
time.sleep(60)
"""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + program],
        env={**os.environ, "PYTHONPATH": path, "START_METHOD": start_method},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    everybody = psutil.Process(process.pid).children(recursive=True)
    try:
        stopped = [p for p in everybody if "resource_tracker" not in command_line(p)]
        assert set(workers) <= set(stopped)
        for worker in stopped:
            worker.suspend()
        until(lambda: all(worker.status() == psutil.STATUS_STOPPED for worker in workers))
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs(everybody, timeout=20)
        assert not alive
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        for worker in everybody:
            try:
                worker.kill()
            except psutil.Error:
                pass
