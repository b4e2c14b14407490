"""The examples, run as a reader would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, one_cpu

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.real


def run(name: str) -> list[str]:
    with one_cpu():
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name)],
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=4 * PATIENCE,
        )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_no_example_is_forgotten() -> None:
    elsewhere = {"dask_cluster.py"}  # tests/cluster/test_ways.py
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names - elsewhere == {"agents.py", "asyncio_agents.py", "bulk_run.py"}


def test_agents_in_threads_each_find_their_passages() -> None:
    lines = run("agents.py")
    asked = lines.index("Where was currywurst invented?")
    assert "Currywurst was invented in Berlin in 1949" in lines[asked + 1]
    assert sum(line.endswith("?") for line in lines) == 8
    assert "requests" in lines[-1]


def test_agents_in_asyncio_answer_while_the_loop_goes_on() -> None:
    lines = run("asyncio_agents.py")
    asked = lines.index("Where was currywurst invented?")
    assert "Currywurst was invented in Berlin in 1949" in lines[asked + 1]
    assert lines[-2] == "4 requests answered, 1 cancelled"
    assert lines[-1].startswith("the loop went round")


def test_a_bulk_run_goes_on_after_it_was_ended() -> None:
    lines = run("bulk_run.py")
    assert lines[0].startswith("4 queries, 48 pairs in ")
    assert lines[1].startswith("2 queries, 24 pairs in ")
    assert lines[1].endswith("; 2 were there already")
    assert lines[2] == "the same ranking in the end: True"
    assert "Currywurst was invented in Berlin in 1949" in lines[lines.index("Where was currywurst invented?") + 1]
