"""`shared_pool`: one pool for everyone who asks for the same model and device."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FAKE, PATIENCE
from fakes import scores_of
from interrupts import at_moment

from mp_rerank import ModelLoadError, ModelSpec, PoolClosedError, PoolConfig, RerankerPool, shared, shared_pool

DOCUMENTS = [f"document {i}" for i in range(10)]
SHARED_FAKE = 'shared_pool(ModelSpec("fake", loader="fakes:load"), "cpu", workers=1)'


pytestmark = pytest.mark.usefixtures("own_registry")


def test_all_who_ask_get_the_same_pool() -> None:
    pool = shared_pool(FAKE, "cpu", workers=1)
    assert shared_pool(FAKE, "cpu") is pool
    assert shared_pool(replace(FAKE), ["cpu"], workers=1) is pool
    scores = [result.relevance_score for result in pool.rerank("query", DOCUMENTS)]
    assert scores == sorted(scores_of("query", DOCUMENTS), reverse=True)


def test_many_threads_asking_at_once_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[RerankerPool] = []
    start, making = threading.Barrier(32), threading.Barrier(32)

    class Counted(shared._SharedPool):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*arguments, **options)
            with contextlib.suppress(threading.BrokenBarrierError):
                making.wait(1.0)  # those that are being made at the same time meet here

    def agent(number: int) -> RerankerPool:
        start.wait(PATIENCE)
        pool = shared_pool(FAKE, "cpu", workers=2)
        assert pool.rerank(f"query {number}", DOCUMENTS, top_n=3)
        return pool

    monkeypatch.setattr(shared, "_SharedPool", Counted)
    with ThreadPoolExecutor(32) as agents:
        [pool] = set(agents.map(agent, range(32)))
    assert [worker.generation for worker in pool.workers()] == [1, 1]
    assert len(made) > 1, "the threads were to be at it together"
    assert all(other is pool or not other.workers() for other in made), "those that came too late never started"


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the machine takes no time."""
    plan = shared.make_plan(PoolConfig(devices="cpu"), FAKE)
    monkeypatch.setattr(shared, "make_plan", lambda config, spec: plan)


@pytest.mark.usefixtures("planned")
def test_many_threads_replacing_a_closed_one_at_once_get_one() -> None:
    for _ in range(50):
        shared_pool(FAKE, "cpu").close()
        start = threading.Barrier(8)

        def agent(_: int, start: threading.Barrier = start) -> RerankerPool:
            start.wait(PATIENCE)
            return shared_pool(FAKE, "cpu")

        with ThreadPoolExecutor(8) as agents:
            assert len(set(agents.map(agent, range(8)))) == 1
    assert shared._places[next(iter(shared._places))].follower is None, "places of pools that are over are forgotten"


@pytest.mark.usefixtures("planned")
def test_it_may_be_asked_for_in_the_middle_of_asking_for_it() -> None:
    """By a signal handler, or a finalizer: at whatever moment, it waits for nothing, and all get the same pool."""

    def asked_twice(moment: int) -> bool:
        shared._places.clear()
        found: list[RerankerPool] = []
        outer: list[RerankerPool] = []
        came_that_far = at_moment(
            lambda: outer.append(shared_pool(FAKE, "cpu")), moment, lambda: found.append(shared_pool(FAKE, "cpu"))
        )
        assert all(one is outer[0] for one in found), moment
        assert shared_pool(FAKE, "cpu") is outer[0]
        return came_that_far

    moment = 1
    while asked_twice(moment):
        moment += 1
    assert moment > 100


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this platform has no timers")
def test_a_signal_handler_may_ask_while_the_machine_is_being_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[RerankerPool] = []
    timers: list[bool] = []
    looking = shared.make_plan

    def slow(*arguments: Any) -> Any:
        if not timers:
            timers.append(True)
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(0.3)  # as nvidia-smi
        return looking(*arguments)

    monkeypatch.setattr(shared, "make_plan", slow)
    before = signal.signal(signal.SIGALRM, lambda number, frame: found.append(shared_pool(FAKE, "cpu")))
    try:
        found.append(shared_pool(FAKE, "cpu"))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(found) == 2
    assert found[0] is found[1]


def test_no_device_and_the_device_it_comes_to_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mp_rerank._planning.machine._gpus", lambda: ())
    assert shared_pool(FAKE) is shared_pool(FAKE, "cpu") is shared_pool(FAKE, "auto")
    monkeypatch.setattr("mp_rerank._planning.machine._gpus", lambda: ("cuda:0", "cuda:1"))
    other = ModelSpec("other", loader="fakes:load")
    assert shared_pool(other) is shared_pool(other, ["cuda:1", "cuda:0"]) is shared_pool(other, "cuda")
    assert shared_pool(other, "cuda:1") not in (shared_pool(other), shared_pool(other, "cpu"))


def test_other_models_and_other_devices_have_pools_of_their_own() -> None:
    pool = shared_pool(FAKE, "cpu")
    assert shared_pool(FAKE, "cuda:7") is not pool
    assert shared_pool(replace(FAKE, name="another"), "cpu") is not pool
    assert shared_pool(replace(FAKE, revision="v2"), "cpu") is not pool
    assert shared_pool(replace(FAKE, loader="fakes:load_salted"), "cpu") is not pool


def test_one_model_with_two_activations_has_two_pools_side_by_side() -> None:
    own, logits = (
        shared_pool(FAKE, "cpu", workers=1),
        shared_pool(replace(FAKE, activation="identity"), "cpu", workers=1),
    )
    assert own is not logits
    assert shared_pool(replace(FAKE, activation="torch.nn.Identity"), "cpu") is logits
    assert shared_pool(FAKE, "cpu") is own
    assert own.rerank("query", DOCUMENTS) == logits.rerank("query", DOCUMENTS)
    logits.close()
    assert shared_pool(FAKE, "cpu") is own


class Device:
    """As torch.device does, it has its name as its text."""

    def __str__(self) -> str:
        return "cpu"


def test_a_device_object_is_its_name() -> None:
    assert shared_pool(FAKE, Device()) is shared_pool(FAKE, "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (lambda: shared_pool(FAKE, "cpu", workers=3), r"workers: .* 'fake' on cpu has 2, and 3 is asked for"),
        (lambda: shared_pool(FAKE, "cpu", overload="raise"), "overload: .* has 'block', and 'raise' is asked"),
        (lambda: shared_pool(replace(FAKE, max_length=64), "cpu"), "max_length: .* has None, and 64 is asked"),
        (lambda: shared_pool(replace(FAKE, dtype="bfloat16"), "cpu"), "dtype: .* has None, and 'bfloat16' is"),
    ],
)
def test_other_settings_are_an_error_that_names_the_setting(asked: Callable[[], RerankerPool], words: str) -> None:
    pool = shared_pool(FAKE, "cpu", workers=2)
    with pytest.raises(ValueError, match=words):
        asked()
    assert shared_pool(FAKE, "cpu") is pool


def test_mistakes_are_the_pools_own() -> None:
    with pytest.raises(TypeError, match="has no option wokers"):
        shared_pool(FAKE, "cpu", wokers=2)
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        shared_pool(FAKE, "gpu")
    with pytest.raises(TypeError, match="shared_pool names them device"):
        shared_pool(FAKE, devices="cpu")
    with pytest.raises(ValueError, match=r"no folder '\./nothing'"):
        shared_pool("./nothing", "cpu")
    assert shared_pool(FAKE, "cpu").rerank("query", DOCUMENTS, top_n=1)


def test_a_closed_one_is_replaced() -> None:
    first = shared_pool(FAKE, "cpu", workers=1)
    first.start()
    first.close()
    second = shared_pool(FAKE, "cpu", workers=1)
    assert second is not first
    assert second.rerank("query", DOCUMENTS, top_n=1)
    with pytest.raises(PoolClosedError):
        first.rerank("query", DOCUMENTS)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_could_not_start_is_replaced(tmp_path: Path, asynchronous: bool) -> None:
    order = ModelSpec(f"!once {tmp_path / 'met'} !raise not yet", loader="fakes:load_obeying")
    pool = shared_pool(order, "cpu", workers=1)
    with pytest.raises(ModelLoadError, match="not yet"):
        asyncio.run(pool.arerank("query", DOCUMENTS)) if asynchronous else pool.rerank("query", DOCUMENTS)
    assert shared_pool(order, "cpu", workers=1).rerank("query", DOCUMENTS, top_n=1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_that_could_not_start_for_where_it_was_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setitem(multiprocessing.process.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    first = shared_pool(FAKE, "cpu", workers=1)
    with pytest.raises(RuntimeError, match="daemonic"):
        asyncio.run(first.arerank("query", DOCUMENTS)) if asynchronous else first.rerank("query", DOCUMENTS)
    second = shared_pool(FAKE, "cpu", isolation="thread")
    assert second is not first
    assert second.rerank("query", DOCUMENTS, top_n=1)
    assert shared_pool(FAKE, "cpu") is second


def test_one_name_in_two_directories_is_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pools = []
    for name in ("one", "two", "one"):
        (tmp_path / name / "models/tiny").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "models/tiny/config.json").write_text("{}")
        monkeypatch.chdir(tmp_path / name)
        pools.append(shared_pool("models/tiny", "cpu"))
        assert shared_pool(tmp_path / name / "models/tiny", "cpu") is pools[-1]
    assert pools[0] is pools[2] is not pools[1]


def test_a_copy_is_the_pool_itself(make_pool: Callable[..., RerankerPool]) -> None:
    for pool in (make_pool(), shared_pool(FAKE, "cpu")):
        assert copy.copy(pool) is copy.deepcopy(pool) is pool
        assert copy.deepcopy({"reranker": [pool]})["reranker"][0] is pool


def test_pickling_says_what_to_do(make_pool: Callable[..., RerankerPool]) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(TypeError, match=r"cannot be pickled: .* Pickle pool\.spec, .*shared_pool"):
            pickle.dumps({"reranker": make_pool()}, protocol)


def test_a_shared_pool_is_unpickled_as_the_shared_pool_there() -> None:
    pool = shared_pool(FAKE, "cpu", workers=1, overload="raise")
    kept = pickle.dumps(pool)
    assert pickle.loads(kept) is pool
    script = """
        import pickle, sys
        from mp_rerank import ModelSpec, shared_pool
        pool = pickle.load(sys.stdin.buffer)
        assert pool is shared_pool(ModelSpec("fake", loader="fakes:load"), "cpu", workers=1, overload="raise")
        print(len(pool.rerank("query", ["a", "b"])))
    """
    done = _run(script, kept)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"2\n", b"")


def test_one_reloaded_with_another_model_is_no_longer_the_first_models() -> None:
    first = shared_pool(FAKE, "cpu", workers=1)
    first.start()
    first.reload(replace(FAKE, name="other"))
    assert shared_pool(FAKE, "cpu") is not first
    first.close()


def test_it_ends_with_the_interpreter() -> None:
    script = f"""
        from mp_rerank import ModelSpec, shared_pool
        pool = {SHARED_FAKE}
        assert len(pool.rerank("query", ["a", "b"])) == 2
        print(pool.workers()[0].pid)
    """
    done = _run(script)
    assert (done.returncode, done.stderr) == (0, "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_gets_a_pool_of_its_own() -> None:
    parent = shared_pool(FAKE, "cpu", workers=1)
    before = parent.rerank("query", DOCUMENTS)

    def child() -> None:
        pool = shared_pool(FAKE, "cpu", workers=1)
        assert pool is not parent
        assert pool.rerank("query", DOCUMENTS) == before
        assert pool.workers()[0].pid != parent.workers()[0].pid
        pool.close()

    pid = _fork(child)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert shared_pool(FAKE, "cpu") is parent
    assert parent.rerank("query", DOCUMENTS) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_fork_that_leaves_by_the_interpreters_exit_ends_its_own_and_not_its_parents() -> None:
    script = f"""
        import os, sys, warnings
        from mp_rerank import ModelSpec, shared_pool
        warnings.simplefilter("ignore")
        parent = {SHARED_FAKE}
        parent.rerank("query", ["a"])
        pid = os.fork()
        pool = {SHARED_FAKE}
        assert len(pool.rerank("query", ["a", "b"])) == 2
        if pid:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert pool is parent
            assert len(pool.rerank("query", ["a", "b"])) == 2
            print("parent done")
        else:
            assert pool is not parent
    """
    done = _run(script)  # multiprocessing's own exit hook grumbles in the child about processes that are not its own
    assert (done.returncode, done.stdout) == (0, "parent done\n"), done.stderr


def test_sharing_and_submitting_import_no_framework_and_no_outer_room() -> None:
    script = f"""
        import sys
        from mp_rerank import ModelSpec, shared_pool
        {SHARED_FAKE}.rerank("query", ["a"])
        outer = [f"mp_rerank.{{room}}" for room in ("integrations", "bulk", "cli", "server")]
        theirs = ["langroid", "langchain_core", "llama_index", "haystack", "rerankers", "torch"]
        print([name for name in outer + theirs if name in sys.modules])
    """
    done = _run(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


def _fork(call: Callable[[], None]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: there are threads
        pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(int(PATIENCE))
        call()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _run(script: str, given: bytes | None = None) -> subprocess.CompletedProcess[Any]:
    lines = [line.removeprefix(" " * 8) for line in script.splitlines()]
    tests = Path(__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])},
        capture_output=True,
        input=given,
        text=given is None,
        timeout=2 * PATIENCE,
    )
