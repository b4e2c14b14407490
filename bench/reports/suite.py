"""`python -m bench suite`: run every command that measures speed or memory, and write one page of their reports.

    python -m bench suite --data DIR            all; throughput alone takes over half an hour on two cores
    python -m bench suite --quick               a small part of each
    python -m bench suite --page                run nothing; write the page and the pictures of earlier reports

Each command runs in a process of its own and writes into `--out`. The page is `README.md` there; its first table is the
one for the project's README.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from bench import ROOT
from bench.reports.files import add_output, draw, read
from bench.reports.report import Report, number

#: command -> its arguments with `--quick`
COMMANDS: dict[str, str] = {
    "throughput": "--workloads minilm-l6/8/short minilm-l6/8/long --rounds 2",
    "latency": "--rounds 2 --requests 200 --seconds 4",
    "scale": "--slots 1 8 32 --pending 1 100 10000 --slices 20 --rounds 1",
    "memory": "--workers 2 --requests 500",
    "load": "--rounds 1",
    "start": "--workers 1 4 --rounds 1",
    "growth": "--workers 1 4 16 --rounds 1",
    "backends": "--rounds 1 --queries 4 --documents 20",
    "models": "--rounds 1 --shapes ettin-17m modernbert-base",
    "weights": "--workers 1 2 --rounds 1",
    "reuse": "--rounds 1 --requests 2",
}

#: reports that are on the page, though the suite does not make them
OTHERS = ("throughput-cuda", "bulk", "langroid", "cluster")
#: commands that measure real texts too, if they get `--data`
WITH_DATA = ("throughput", "backends")


def main(argv: Sequence[str]) -> int:
    """Run the commands asked for and write the page; 1 if any of them failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS), help="these commands alone")
    parser.add_argument("--quick", action="store_true", help="a small part of each")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--data", type=Path, help="the folder with scifact/ and vaswani/, for their texts")
    add_output(parser)
    options = parser.parse_args(argv)
    failed = []
    for command in [] if options.page else options.only:
        arguments = COMMANDS[command].split() if options.quick else []
        if command in WITH_DATA and options.data is not None:
            arguments += ["--data", str(options.data.resolve())]
        print(f"\n{command} …", flush=True)
        start = time.perf_counter()
        line = [sys.executable, "-m", "bench", command, *arguments, "--out", str(options.out.resolve())]
        done = subprocess.run(line, cwd=ROOT, env={**os.environ, "TQDM_DISABLE": "1"})
        print(f"{command}: exit code {done.returncode} after {time.perf_counter() - start:.0f} s", flush=True)
        if done.returncode:
            failed.append(command)
    reports = [read(path) for command in (*COMMANDS, *OTHERS) if (path := options.out / f"{command}.json").is_file()]
    for report in reports if options.page else []:
        draw(report, options.out)
    (options.out / "README.md").write_text(page(reports, options.out), encoding="utf-8")
    print(f"{options.out / 'README.md'}: {', '.join(report.command for report in reports)}")
    return int(bool(failed))


def page(reports: Sequence[Report], out: Path) -> str:
    """The page: the table for the project's README, then all reports."""
    parts = ["# Results", "Medians, and in brackets the range of the rounds. `python -m bench suite` writes this page."]
    parts += [headline(report) for report in reports if report.command == "throughput"]
    for report in reports:
        parts.append(report.markdown().rstrip())
        if (out / f"{report.command}.png").is_file():
            parts.append(f"![{report.title}]({report.command}.png)")
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """A line for each work-load: the locked model, the best of the others, the pool."""
    lines = [
        "| model/agents/texts | one model, a lock | best of the others | mp_rerank, float32 | mp_rerank, bfloat16 |",
        "|---|---:|---|---:|---:|",
    ]
    rates: dict[str, dict[str, float]] = {}
    for row in report.rows:
        if row.measure == "pairs/s":
            rates.setdefault(row.of["work"], {})[row.of["contender"]] = row.median
    for work, found in rates.items():
        lock = found.pop("one CrossEncoder, a lock", 0.0)
        ours = [found.pop(f"mp_rerank, {dtype}", None) for dtype in ("float32", "bfloat16")]
        best = max(found, key=lambda name: found[name], default=None)
        cells = [work, number(lock), "" if best is None else f"{number(found[best])} ({best})"]
        cells += ["" if rate is None else f"{number(rate)} (x {rate / lock:.1f})" for rate in ours]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Pairs a second; in brackets, beside the lock."])
