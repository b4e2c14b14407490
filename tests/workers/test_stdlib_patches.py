"""What is replaced in the standard library is replaced once, for one thread, and found again by whoever comes later."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

from conftest import PATIENCE

from mp_rerank._workers import stdlib_patches
from mp_rerank._workers.stdlib_patches import replaced_on_this_thread

RELOADING = """
import importlib, multiprocessing, multiprocessing.spawn, sys
from mp_rerank import ModelSpec, RerankerPool

def use():
    with RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1) as pool:
        return len(pool.rerank("query", ["a", "b", "c"]))

if __name__ == "__main__":
    print(use())
    there = multiprocessing.spawn.get_preparation_data
    for name in ("stdlib_patches", "surroundings", "launching", "process") * 2:
        importlib.reload(sys.modules[f"mp_rerank._workers.{name}"])
    print(use(), multiprocessing.spawn.get_preparation_data is there)
    child = multiprocessing.get_context("spawn").Process(target=use)  # which needs the main module
    child.start()
    child.join()
    print(child.exitcode)
"""


def test_modules_that_are_loaded_again_leave_other_people_s_processes_alone(tmp_path: Path) -> None:
    """Each load of a module that replaces what it finds would put one more layer on it, which may call itself."""
    script = tmp_path / "reloading.py"
    script.write_text(RELOADING)
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.stdout == "3\n3 True\n0\n", done.stderr


def test_two_copies_share_one_switch() -> None:
    module = type(sys)("stdlib")
    module.function = lambda: "original"  # type: ignore[attr-defined]
    spec = importlib.util.find_spec(stdlib_patches.__name__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    with replaced_on_this_thread(module, "function", lambda: "first"):
        switch = module.function
        with copy.replaced_on_this_thread(module, "function", lambda: "second"):
            assert module.function is switch
            assert module.function() == "second"
            seen: list[str] = []
            other = threading.Thread(target=lambda: seen.append(module.function()))
            other.start()
            other.join()
            assert seen == ["original"]
        assert module.function() == "first"
    assert module.function() == "original"
