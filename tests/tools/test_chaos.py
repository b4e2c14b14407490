"""A few seconds of chaos; half a minute of it is a tox environment, and ``python -m bench chaos`` takes any time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from clusters import workers_of
from conftest import START_METHODS


@pytest.mark.parametrize("start_method", ["spawn", *START_METHODS[2:]])
def test_agents_lose_nothing_while_workers_die(start_method: str) -> None:
    command = [sys.executable, "-m", "bench", "chaos", "--seconds", "5", "--agents", "32", "--workers", "2", "--json"]
    command += ["--start-method", start_method]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert report["crashes"] > 0
    assert report["outcomes"]["scored"] > 10
    assert report["pairs_coalesced"] > 0
    assert report["pairs_cached"] > 0
    for fault in ("lost", "wrong", "unexplained", "leaked_processes", "leaked_threads", "leaked_files", "unreleased"):
        assert report[fault] == 0


def test_a_worker_that_ends_while_it_is_looked_at_is_none() -> None:
    ended = psutil.Popen([sys.executable, "-c", "pass"])
    ended.wait()

    class Nanny:
        def children(self) -> list[psutil.Process]:
            return [ended]

    assert workers_of(Nanny()) == []  # type: ignore[arg-type]
