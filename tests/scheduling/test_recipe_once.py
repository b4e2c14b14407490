"""Prove once: one worker of a model finds its recipe, and every other one and every later one is given it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from conftest import ranked, until

from mp_rerank import ModelSpec, RerankerPool

MakePool = Callable[..., RerankerPool]


def spec(tmp_path: Path) -> tuple[ModelSpec, Path]:
    notes = tmp_path / "notes"
    return ModelSpec(str(notes), loader="fakes:load_optimizable"), notes


def test_one_worker_finds_it_and_the_others_are_given_it(make_pool: MakePool, tmp_path: Path) -> None:
    model, notes = spec(tmp_path)
    with make_pool(model, workers=3) as pool:
        given = notes.read_text().split()
        assert given.count("none") == 1
        [found] = set(given) - {"none"}
        assert int(found) in [info.pid for info in pool.workers()]
        assert len(given) == 3
        assert pool.rerank("query", ["a", "b"]) == ranked("query", ["a", "b"])


def test_whoever_comes_later_is_given_it_too(make_pool: MakePool, tmp_path: Path) -> None:
    model, notes = spec(tmp_path)
    with make_pool(model, workers=1) as pool:
        first = pool.workers()[0].pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        until(lambda: pool.workers()[0].generation == 2 and pool.workers()[0].state == "ready")
        assert notes.read_text().split() == ["none", str(first)]


def test_another_model_has_a_recipe_of_its_own(make_pool: MakePool, tmp_path: Path) -> None:
    model, notes = spec(tmp_path)
    (tmp_path / "other").mkdir()
    other, other_notes = spec(tmp_path / "other")
    with make_pool(model) as pool:
        pool.reload(other)
        assert notes.read_text().split().count("none") == 1
        assert other_notes.read_text().split().count("none") == 1


def test_where_the_one_that_looks_for_it_dies_another_does(make_pool: MakePool, tmp_path: Path) -> None:
    model, notes = spec(tmp_path)
    notes.with_suffix(".die").touch()
    with make_pool(model, workers=2) as pool:
        assert notes.read_text().split().count("none") == 2
        assert {info.state for info in pool.workers()} == {"ready"}
        assert pool.stats().exits == {"crashed": 1}
