"""Every way out: no worker is left, no thread hangs, every future is resolved, and nothing of a worker's is printed.

Each case is a script in a process and a session of its own, so that a Ctrl-C goes to its whole process group as from a
terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import FAKE, PATIENCE, START_METHODS, Fifo, ranked, until
from processes import command_line

from mp_rerank import ModelSpec, PoolClosedError, RerankerPool, RerankError
from mp_rerank._scheduling.dispatcher import Dispatcher
from mp_rerank._workers.process import ProcessHandle

MakePool = Callable[..., RerankerPool]

TESTS = Path(__file__).parents[1]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

# What every script begins with. STATE is where its pool is to be when the end comes; ``say`` tells the test.
PRELUDE = """
import atexit, gc, os, signal, sys, threading, time
from concurrent.futures import wait
from mp_rerank import ModelSpec, RerankerPool

STATE, GATE, PARTING = sys.argv[1:4]
MODELS = {
    "starting": ModelSpec(f"!read {GATE}", loader="fakes:load_obeying"),
    "broken": ModelSpec("deadly", loader="fakes:load_deadly"),
}

def say(word):
    os.write(1, f"{word}\\n".encode())

def rest():
    "Sleep, in naps: a signal that comes as CPython's main thread falls asleep waits until it wakes."
    for _ in range(600):
        time.sleep(0.1)

def make():
    options = {"restart_backoff": 30.0} if STATE == "restarting" else {"restart_backoff": 0.01, "max_restarts": 1}
    options.update(devices="cpu", workers=1, start_method=os.environ["START_METHOD"])
    return RerankerPool(MODELS.get(STATE, ModelSpec("fake", loader="fakes:load")), **options)

def bring(pool):
    "Bring the pool into STATE, say so, and return its futures."
    futures = []
    if STATE == "starting":
        def start():
            try:
                pool.start()
                say("started?")
            except BaseException as error:
                say(f"start: {type(error).__name__}")
        threading.Thread(target=start, daemon=True).start()
        return futures  # the test knows by the gate
    pool.start()
    if STATE == "busy":
        many = ["document"] * 500
        futures = [pool.submit("query", texts) for texts in ([f"!read {GATE}", *many], many, many)]
        return futures  # the test knows by the gate
    if STATE == "broken":
        futures = [pool.submit("query", ["document"]) for _ in range(5)]
        wait(futures)
    if STATE == "restarting":  # after two deaths in a row, it waits for the thirty seconds of its back-off
        for crashes in (1, 2):
            while pool.workers()[0].state != "ready":
                time.sleep(0.01)
            os.kill(pool.workers()[0].pid, signal.SIGKILL)
            while pool.stats().crashes < crashes:
                time.sleep(0.01)
        futures = [pool.submit("query", ["document"]) for _ in range(5)]
    say("ready")
    return futures

def report(futures):
    done, pending = wait(futures, timeout=30)
    say(f"pending {len(pending)}")
"""

ENDINGS = {
    "close and drain": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
pool.close()
report(futures)
""",
    "close at once": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
pool.close(drain=False)
report(futures)
""",
    "leaving with on an error": """
futures = []
try:
    if STATE == "starting":
        pool = make()
        bring(pool)
        sys.stdin.readline()
        raise_in = pool.__exit__(ValueError, ValueError(), None)
    else:
        with make() as pool:
            futures = bring(pool)
            sys.stdin.readline()
            raise ValueError
except ValueError:
    pass
report(futures)
""",
    "garbage collection": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
if STATE == "starting":
    pool.close()  # its starting thread holds it
del pool
gc.collect()
report(futures)
""",
    "garbage collection in another thread": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
if STATE == "starting":
    pool.close()
pool.itself = pool
del pool
collecting = threading.Thread(target=gc.collect)
collecting.start()
collecting.join()
report(futures)
""",
    "interpreter exit": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
atexit.register(report, futures)
""",
    "sys.exit in the middle": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
atexit.register(report, futures)
sys.exit(0)
""",
    "an error nobody catches": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
atexit.register(report, futures)
sys.stderr = open(os.devnull, "w")
raise ValueError
""",
    "two threads close": """
pool = make()
futures = bring(pool)
sys.stdin.readline()
closing = [threading.Thread(target=pool.close, kwargs={"drain": drain}) for drain in (True, False, False)]
for thread in closing:
    thread.start()
for thread in closing:
    thread.join()
report(futures)
""",
}


class Script:
    """A script that runs, its workers, and what it says."""

    def __init__(self, program: str, state: str, gate: Path, parting: str = "", start_method: str = "spawn") -> None:
        os.mkfifo(gate)
        path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + program, state, str(gate), parting],
            env={**os.environ, "PYTHONPATH": path, "START_METHOD": start_method},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.said: list[str] = []
        self.errors = ""
        self.reading = [threading.Thread(target=read) for read in (self._read, self._read_errors)]
        for thread in self.reading:
            thread.start()
        self.gate: int | None = None
        self.workers: list[psutil.Process] = []

    def arrive(self, program: str, state: str, gate: Path) -> None:
        """Wait until the script is where its end is to come, and look whom it has started."""
        if state in ("starting", "busy"):
            self.gate = os.open(gate, os.O_WRONLY)  # once the worker stands at it
        else:
            self.wait_for("ready")
        self.workers = [
            process
            for process in psutil.Process(self.process.pid).children(recursive=True)
            if "resource_tracker" not in command_line(process)
        ]
        assert self.workers or state in ("broken", "restarting") or program in (SPAWNING, FORKED_WHILE_SPAWNING)

    def wait_for(self, word: str) -> None:
        until(lambda: word in self.said or not self.reading[0].is_alive())
        assert word in self.said, (self.said, self.errors)

    def end(self, *, release: bool = False) -> None:
        """Tell it to go on to its end, perhaps past the gate, and wait for that, and for its workers."""
        if release:
            self.release()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it has ended already
            pass
        self.process.wait(PATIENCE)
        self.gone()
        for thread in self.reading:
            thread.join(PATIENCE)

    def gone(self) -> None:
        _, alive = psutil.wait_procs(self.workers, timeout=PATIENCE)
        assert not alive, f"left behind: {alive}"

    def release(self) -> None:
        if self.gate is not None:
            os.close(self.gate)
            self.gate = None

    def kill(self) -> None:
        self.release()
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait(PATIENCE)
        for thread in self.reading:
            thread.join(PATIENCE)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip())

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Script]]:
    scripts: list[Script] = []

    default = request.config.getoption("--start-method") or "spawn"

    def make(program: str, state: str, parting: str = "", start_method: str = default) -> Script:
        gate = tmp_path / f"gate{len(scripts)}"
        script = Script(program, state, gate, parting, start_method)
        scripts.append(script)  # before anything can fail: what was started is ended
        script.arrive(program, state, gate)
        return script

    yield make
    for script in scripts:
        script.kill()


def check(script: Script, *, release: bool = False, code: int = 0, words: Sequence[str] = ("pending 0",)) -> None:
    """That it ends, with all of its workers, and says what it should and nothing that it should not."""
    script.end(release=release)
    assert script.process.returncode == code, (script.said, script.errors)
    for word in words:
        assert word in script.said, (script.said, script.errors)
    assert "started?" not in script.said
    assert "Traceback" not in script.errors, script.errors
    assert "resource_tracker" not in script.errors, script.errors


@pytest.mark.parametrize("state", ["starting", "idle", "busy", "broken", "restarting"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_every_ending_from_every_state(run: Callable[..., Script], ending: str, state: str) -> None:
    script = run(ENDINGS[ending], state)
    # Who drains needs the workers to go on; the others leave with a worker that would never have.
    drains = ending == "close and drain" or "garbage" in ending
    if state == "restarting" and drains:
        pytest.skip("it waits for a worker, as it was told to, for the thirty seconds of its back-off")
    code = 1 if ending == "an error nobody catches" else 0
    check(script, release=state == "busy" and drains, code=code)


@pytest.mark.parametrize("start_method", START_METHODS[1:])
@pytest.mark.parametrize("ending", ["close at once", "interpreter exit", "killed"])
def test_a_fork_server_or_a_template_and_its_workers_leave_too(
    run: Callable[..., Script], ending: str, start_method: str
) -> None:
    script = run(ENDINGS.get(ending, STAYING), "busy", start_method=start_method)
    assert len(script.workers) == 2, "the server or the template, and the worker"
    if ending == "killed":
        script.process.kill()
        script.end()
    else:
        check(script)


WAITING = """
pool = None
futures = []
try:
    pool = make()
    if STATE == "starting":
        pool.start()
    with pool:
        futures = bring(pool)
        if PARTING == "closing":
            say("closing")
            pool.close()
        rest()
except KeyboardInterrupt:
    say("interrupted")
report(futures)
"""


@pytest.mark.parametrize(
    ("state", "parting"),
    [("starting", ""), ("idle", ""), ("busy", ""), ("busy", "closing"), ("broken", ""), ("restarting", "")],
)
def test_ctrl_c(run: Callable[..., Script], state: str, parting: str) -> None:
    """Once, while the main thread starts the pool, sleeps, or closes it."""
    script = run(WAITING, state, parting)
    if parting:
        script.wait_for(parting)
    os.killpg(script.process.pid, signal.SIGINT)
    check(script, words=("interrupted", "pending 0"))


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_ctrl_c_again_and_again(run: Callable[..., Script], state: str) -> None:
    """An impatient user: from the first moment of the script until it has ended."""
    script = run(WAITING, state)
    while script.process.poll() is None:
        try:
            os.killpg(script.process.pid, signal.SIGINT)
        except ProcessLookupError:
            break
        try:
            script.process.wait(0.05)
        except subprocess.TimeoutExpired:
            pass
    script.end()
    assert "spawn_main" not in script.errors  # tracebacks are the main thread's own


def test_ctrl_c_while_closing_waits_takes_nothing_for_ended(make_pool: MakePool, fifo: Fifo) -> None:
    """As ``Thread.join`` does before Python 3.13, once it was interrupted: the thread it waited for is "not alive"."""
    pool = make_pool(workers=1).start()
    held = pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    dispatcher = pool._dispatcher
    assert dispatcher is not None
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        until(lambda: "join" in [frame.name for frame in traceback.extract_stack(sys._current_frames()[main])])
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        dispatcher.join()
    interrupting.join(PATIENCE)
    assert not dispatcher.join(0.05)
    fifo.release()
    assert held.result(PATIENCE)


SPAWNING = """
def interrupt():
    time.sleep(float(PARTING))
    os.killpg(0, signal.SIGINT)

say("ready")
try:
    threading.Thread(target=interrupt, daemon=True).start()
    with make() as pool:
        rest()
except KeyboardInterrupt:
    say("interrupted")
print("pending 0")
"""


@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.2])
def test_ctrl_c_while_workers_are_being_spawned_and_import(run: Callable[..., Script], delay: float) -> None:
    """Not one of them prints that it was interrupted: none ever hears of it."""
    script = run(SPAWNING, "idle", str(delay))
    check(script, words=("interrupted", "pending 0"))
    # Those that were started after the first look at the children are gone as well.
    until(lambda: not [p for p in psutil.process_iter() if in_session(p, script.process.pid)])


INTERRUPTED_CALLS = """
from interrupts import interrupted

CALLS = {
    "submit": lambda: pool.submit("query", ["document"] * 3),
    "rerank": lambda: pool.rerank("query", ["document"] * 3),
    "predict": lambda: pool.predict([("query", "document")] * 3),
    "result": lambda: pool.submit("query", ["document"] * 3).result(),
    "stats": lambda: pool.stats(),
}
gc.disable()  # what it finds might be interrupted instead
pool = make().start()
say("ready")
moment = 1
while interrupted(CALLS[PARTING], moment):
    another = threading.Thread(target=pool.rerank, args=("another", ["document"]), daemon=True)
    another.start()
    another.join(20)
    if another.is_alive():
        say(f"nobody can go on after moment {moment}")
        os._exit(1)
    moment += 1
say("every moment" if moment > 20 else f"only {moment} moments")
while pool.stats().pending_pairs:
    time.sleep(0.01)
pool.close()
report([])
"""


@pytest.mark.parametrize("call", ["submit", "rerank", "predict", "result", "stats"])
def test_ctrl_c_at_any_moment_of_a_call_stops_nobody_else(run: Callable[..., Script], call: str) -> None:
    """No lock stays taken, and no place of what nobody waits for any more."""
    check(run(INTERRUPTED_CALLS, "idle", call), words=("every moment", "pending 0"))


INTERRUPTED_WORKER = """
pool = make()
starting = threading.Thread(target=pool.start)
starting.start()
while starting.is_alive():
    for info in pool.workers():
        if info.pid is not None:
            os.kill(info.pid, signal.SIGINT)
    time.sleep(0.002)
os.kill(pool.workers()[0].pid, signal.SIGINT)
assert len(pool.rerank("query", ["document"] * 9)) == 9
say(f"crashes {pool.stats().crashes}")
pool.close()
say("ready")
"""


def test_a_worker_hears_of_no_ctrl_c_from_its_first_moment(run: Callable[..., Script]) -> None:
    """Nor the very first, with which multiprocessing starts its tracker: that unblocks the signal."""
    check(run(INTERRUPTED_WORKER, "restarting"), words=("crashes 0",))


def in_session(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):
        return False


STAYING = """
pool = make()
futures = bring(pool)
if STATE == "starting" or STATE == "busy":
    say("ready")
if PARTING == "fork":
    child = os.fork()
    if child == 0:
        time.sleep(120)
        os._exit(0)
    say(f"forked {child}")
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["starting", "idle", "busy", "broken", "restarting"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_the_parent_is_killed(run: Callable[..., Script], state: str, name: str) -> None:
    """Nothing of its own runs any more: the workers notice by themselves."""
    script = run(STAYING, state)
    script.process.send_signal(getattr(signal, name))
    assert script.process.wait(PATIENCE) == -getattr(signal, name)
    script.end()
    assert "Traceback" not in script.errors, script.errors


@needs_fork
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("state", ["starting", "idle", "busy", "broken", "restarting"])
def test_the_parent_is_killed_and_a_fork_of_it_lives_on(run: Callable[..., Script], state: str) -> None:
    """It holds open every pipe whose end would tell the workers."""
    script = run(STAYING, state, "fork")
    until(lambda: any(line.startswith("forked ") for line in script.said))
    forked = psutil.Process(int(next(line for line in script.said if line.startswith("forked ")).split()[1]))
    script.workers = [process for process in script.workers if process != forked]
    script.process.kill()
    script.process.wait(PATIENCE)
    script.gone()
    assert forked.is_running()


FORKING = """
import warnings
warnings.simplefilter("ignore")  # 3.12 warns of forking with threads
pool = make()
futures = bring(pool)
pid = os.fork()
if pid == 0:
    words = []
    for call in (lambda: pool.submit("query", ["document"]), lambda: pool.start(), lambda: pool.reload("builtin")):
        try:
            call()
        except Exception as error:
            words.append(type(error).__name__)
    words.append(len(pool.workers()))
    pool.stats()
    pool.close()
    say(f"child {words}")
    if PARTING == "collect":
        del pool
        gc.collect()
    if PARTING == "_exit":
        os._exit(0)
    sys.exit(0)
os.waitpid(pid, 0)
sys.stdin.readline()
if STATE != "broken":
    assert len(pool.rerank("query", ["document"] * 9)) == 9
    assert pool.stats().crashes == 0
pool.close()
report(futures)
"""


@needs_fork
@pytest.mark.parametrize(
    ("state", "parting"), [("idle", ""), ("idle", "collect"), ("idle", "_exit"), ("busy", ""), ("broken", "")]
)
def test_a_fork_has_no_pool_and_takes_none_away(run: Callable[..., Script], state: str, parting: str) -> None:
    script = run(FORKING, state, parting)
    child = "child ['PoolClosedError', 'PoolClosedError', 'PoolClosedError', 1]"
    check(script, release=state == "busy", words=(child, "pending 0"))


FORKED_WHILE_SPAWNING = """
import multiprocessing.util, warnings
warnings.simplefilter("ignore")
spawn = multiprocessing.util.spawnv_passfds
forks = []

def spawn_and_fork(*args):
    "As if another thread forked while this one spawns: the fork holds both ends of every pipe of the worker's."
    pid = spawn(*args)
    if not forks and "resource_tracker" not in str(args):
        forks.append(os.fork())
        if forks[-1] == 0:
            time.sleep(60)
            os._exit(0)
    return pid

multiprocessing.util.spawnv_passfds = spawn_and_fork
pool = make()
pool.start()
say("ready")
assert len(forks) == 1, forks
for info in pool.workers():
    os.kill(info.pid, signal.SIGKILL)
assert len(pool.rerank("query", ["document"] * 99)) == 99
say("reranked")
for fork in forks:
    os.kill(fork, signal.SIGKILL)
sys.stdin.readline()
pool.close()
report([])
"""


@needs_fork
def test_a_fork_made_while_a_worker_was_started_hides_no_death(run: Callable[..., Script]) -> None:
    check(run(FORKED_WHILE_SPAWNING, "idle"), words=("reranked", "pending 0"))


# In this process.


def test_close_while_it_starts(make_pool: MakePool, fifo: Fifo) -> None:
    """A worker that loads has nothing to finish: it is not waited for."""
    pool = make_pool(ModelSpec(fifo.order, loader="fakes:load_obeying"), workers=1)
    errors: list[BaseException] = []

    def start() -> None:
        try:
            pool.start()
        except PoolClosedError as error:
            errors.append(error)

    starting = threading.Thread(target=start)
    starting.start()
    fifo.wait_until_read()
    pool.close()
    starting.join(PATIENCE)
    assert len(errors) == 1
    assert not psutil.pid_exists(fifo.pid)
    fifo.release()


def test_an_interrupt_while_it_starts_waits_for_what_has_begun(
    make_pool: MakePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an interpreter that exits at once would find the dispatcher launching workers, and neither could go on."""
    begin = Dispatcher.begin

    def interrupted(dispatcher: Dispatcher) -> None:
        begin(dispatcher)
        raise KeyboardInterrupt

    monkeypatch.setattr(Dispatcher, "begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_pool().start()
    assert [thread for thread in threading.enumerate() if thread.name == "mp_rerank-dispatcher"] == []


def test_start_while_it_closes(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1).start()
    held = pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: pool._closed)
    for call in (pool.start, lambda: pool.submit("query", ["document"])):
        with pytest.raises(PoolClosedError):
            call()
    fifo.release()
    closing.join(PATIENCE)
    assert held.result(0)


def test_close_with_a_limit_to_its_patience(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1).start()
    held = pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    pool.close(timeout=0.1)
    assert isinstance(held.exception(0), PoolClosedError)
    fifo.release()


def test_a_drain_can_be_cut_short(make_pool: MakePool, fifo: Fifo) -> None:
    pool = make_pool(workers=1).start()
    held = pool.submit("query", [fifo.order])
    fifo.wait_until_read()
    closing = threading.Thread(target=pool.close)
    closing.start()
    until(lambda: pool._closed)
    pool.close(drain=False)
    closing.join(PATIENCE)
    assert isinstance(held.exception(0), PoolClosedError)
    fifo.release()


def test_draining_goes_on_through_deaths(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool().start()
    mortal = [f"!once {tmp_path / 'died'} !signal SIGKILL", *(f"document {i}" for i in range(50))]
    dying = pool.submit("query", mortal)
    poisoned = pool.submit("query", ["!os._exit 1"])
    pool.close()
    assert dying.result(0) == ranked("query", mortal)
    assert poisoned.exception(0) is not None


def test_draining_a_broken_pool(make_pool: MakePool) -> None:
    pool = make_pool(ModelSpec("deadly", loader="fakes:load_deadly"), max_restarts=1).start()
    futures = [pool.submit("query", ["document"]) for _ in range(9)]
    pool.close()
    assert all(isinstance(f.exception(0), RerankError) for f in futures)


def test_closing_kills_a_worker_that_is_stopped(make_pool: MakePool) -> None:
    pool = make_pool(workers=1).start()
    pid = pool.workers()[0].pid
    assert pid is not None
    psutil.Process(pid).suspend()
    pool.close()  # to leave is asked of it first
    assert not psutil.pid_exists(pid)


def test_many_pools_come_and_go(make_pool: MakePool) -> None:
    process = psutil.Process()
    make_pool(workers=1).start().close()
    before = process.num_fds(), threading.active_count()
    for _ in range(10):
        pool = RerankerPool(FAKE, devices="cpu", workers=1)
        pool.submit("query", ["document"])
        pool.close()
    del pool
    until(lambda: (process.num_fds(), threading.active_count()) <= before)


def test_submitting_from_many_threads_while_it_closes(make_pool: MakePool) -> None:
    pool = make_pool().start()
    outcomes: list[bool] = []

    def agent() -> None:
        while True:
            try:
                future = pool.submit("query", ["document"] * 3)
            except PoolClosedError:
                return
            error = future.exception(PATIENCE)
            outcomes.append(error is None or isinstance(error, PoolClosedError))

    agents = [threading.Thread(target=agent) for _ in range(8)]
    for thread in agents:
        thread.start()
    until(lambda: len(outcomes) > 50)
    pool.close(drain=False)
    for thread in agents:
        thread.join(PATIENCE)
    assert all(outcomes)


@pytest.mark.parametrize(
    ("options", "error"),
    [({"drain": "false"}, TypeError), ({"timeout": "1"}, TypeError), ({"timeout": -1}, ValueError)],
)
def test_a_mistake_in_closing_closes_nothing(
    make_pool: MakePool, options: dict[str, Any], error: type[Exception]
) -> None:
    pool = make_pool(workers=1).start()
    with pytest.raises(error, match=next(iter(options))):
        pool.close(**options)
    assert pool.rerank("query", ["document"])
    pool.close(timeout=10**400)  # no limit


def test_no_clock_is_too_short_for_a_patient_caller(make_pool: MakePool) -> None:
    with make_pool(workers=1) as pool:
        assert pool.submit("query", ["document"]).result(10**400)


def test_a_worker_that_is_still_being_launched_can_be_let_go() -> None:
    """It was killed and does not end: there is no executor yet that anybody would wait for."""
    handle = object.__new__(ProcessHandle)
    handle._executor = handle._process = None
    handle.abandon()
