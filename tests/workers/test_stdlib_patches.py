"""What is replaced in the standard library is replaced once, for one thread, and found again by whoever comes later."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import multiprocessing.spawn
import sys
import threading
from collections.abc import Callable

from mp_rerank import RerankerPool
from mp_rerank._workers import stdlib_patches
from mp_rerank._workers.stdlib_patches import replaced_on_this_thread


def test_modules_that_are_loaded_again_leave_other_people_s_processes_alone(
    make_pool: Callable[..., RerankerPool],
) -> None:
    """Each load of a module that replaces what it finds would put one more layer on it, which may call itself."""
    names = ("stdlib_patches", "surroundings", "launching", "process")
    with make_pool(workers=1) as pool:
        assert len(pool.rerank("query", ["a"])) == 1
        there = multiprocessing.spawn.get_preparation_data
        for name in names * 2:
            importlib.reload(sys.modules[f"mp_rerank._workers.{name}"])
    with make_pool(workers=1) as pool:
        assert len(pool.rerank("query", ["a"])) == 1
    assert multiprocessing.spawn.get_preparation_data is there
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0
    data = multiprocessing.spawn.get_preparation_data("child")
    assert {"init_main_from_name", "init_main_from_path"} & set(data) or not hasattr(
        sys.modules["__main__"], "__file__"
    )


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
