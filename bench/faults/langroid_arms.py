"""`python -m bench langroid`: ten Langroid agents rerank at once: with the pool, behind a lock, and without a lock.

Each of these three arms runs `langroid_tasks.py` in a process of its own; its docstring describes the tasks. The arms
run in turns. Langroid and qdrant-client must be installed. On transformers 4.57 the arm without a lock raises errors,
and later loads in its process fail too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.reports.files import add_output, finish
from bench.reports.report import Report

ARMS = {"pool": "mp_rerank's install()", "own": "Langroid's own: a lock", "original": "no lock: each loads a model"}
TASKS = Path(__file__).with_name("langroid_tasks.py")


def main(argv: Sequence[str]) -> int:
    """Run every arm in turns and write the table."""
    parser = argparse.ArgumentParser(prog="python -m bench langroid", description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=10, help="agents at once (default 10)")
    parser.add_argument("--rounds", type=int, default=20, help="questions to each agent (default 20)")
    parser.add_argument("--filler", type=int, default=3, help="sentences that make each passage longer (default 3)")
    parser.add_argument("--turns", type=int, default=2, help="how often each arm is run (default 2)")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("langroid", "Langroid's agents", options)
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for _ in range(options.turns):
        for arm in ARMS:
            sizes = [f"--{name}={getattr(options, name)}" for name in ("tasks", "rounds", "filler")]
            done = subprocess.run([sys.executable, TASKS, "--arm", arm, *sizes], capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            found[arm].append(json.loads(done.stdout.splitlines()[-1]))
            print(found[arm][-1], flush=True)
    for arm, runs in found.items():
        of = {"agents rerank with": ARMS[arm]}
        report.add(of, "tasks", sum(run["tasks"] for run in runs), better="")
        report.add(of, "errors", sum(run["errors"] for run in runs))
        report.add(of, "first round, s", [run["first_round"] for run in runs])
        report.add(of, "a later round, s", [run["later_rounds"] for run in runs])
        report.add(of, "of that a rerank, mean, s", [run["mean_rerank_seconds"] for run in runs])
        for words in sorted({text for run in runs for text in run["messages"]}):
            report.note(f"{ARMS[arm]}: {sum(run['messages'].get(words, 0) for run in runs)} x {words}")
    finish(report, options.out)
    return 0
