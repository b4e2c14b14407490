"""The tox matrix: make, test and race every environment, and write one page of the results.

    python -m bench matrix                    all environments, then the page
    python -m bench matrix -e ENV [ENV ...]   these environments, then the page of all that have run
    python -m bench matrix --gather           the page alone

Each environment is made by ``tox run``, which runs the tests of real models in it. (The other tests import none of what
an environment pins; ``py3…-core`` runs them on each Python.) Then ``mp-rerank race --json`` runs in it. The results of
an environment are kept in a file of RECORDS, so that environments can run on different days or machines.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import ROOT
from bench.reports.files import RESULTS

RECORDS = RESULTS / "matrix"
PAGE = ROOT / "docs" / "matrix.md"
INTRODUCTION = """# The matrix

Written by `python -m bench matrix`: each environment made by tox, the tests of real models run in it, and then
`mp-rerank race` ([what its columns mean](race.md)). Time is that of making it and of its tests, on about one core.

Tests of frameworks and of other runtimes are skipped: `tox run -e newest` and `-e backends` have those.
Environments with torch 2.4 or 2.5, transformers 4.49, or sentence-transformers 3.4 or 5.0 are below the declared
minimums, and show why these are no lower.
"""
NOT_HERE = re.compile(r"^SKIPPED .*(is not installed|only with MP_RERANK_\w+=required)$")
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|deselected)")


def main(argv: Sequence[str]) -> int:
    """Run the environments asked for and write the page; 1 if a test failed or the pool went wrong in any."""
    parser = argparse.ArgumentParser(
        prog="python -m bench matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-e", dest="environments", nargs="+", metavar="ENV", help="these alone (default: all)")
    parser.add_argument("--gather", action="store_true", help="run nothing, write the page")
    parser.add_argument("--delete", action="store_true", help="delete each environment after its run")
    parser.add_argument("--threads", type=int, default=8, help="threads that race (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each case (default: 3)")
    arguments = parser.parse_args(argv)
    RECORDS.mkdir(parents=True, exist_ok=True)
    if not arguments.gather:
        for name in arguments.environments or environments():
            print(f"{name} …", flush=True)
            result = run(name, arguments)
            (RECORDS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
            print(f"{name}: {result['tests']}; {result['seconds']:.0f} s, {result['bytes'] / 1e9:.1f} GB", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(page(results)) + "\n")
    print(f"{PAGE.relative_to(ROOT)}: {len(results)} environments")
    return int(any(not result["passed"] or result["race"].get("failed", True) for result in results))


def environments() -> list[str]:
    """The names of the matrix's environments in tox.ini: each pins Python, torch and the two libraries."""
    listed = subprocess.run([*tox("list"), "--no-desc"], capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if re.fullmatch(r"py\d+-torch.*", name)]


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make, test and race one environment."""
    start = time.monotonic()
    tested = subprocess.run(
        tox("run", "--skip-missing-interpreters", "false", "-e", name), capture_output=True, text=True
    )
    seconds = time.monotonic() - start
    said = tested.stdout + tested.stderr
    options = ["--json", "--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    raced = subprocess.run(
        [
            *tox("exec", "-q", "-e", name, "--skip-pkg-install"),
            *("--", "python", "-m", "mp_rerank.cli", "race", *options),
        ],
        capture_output=True,
        text=True,
    )
    where = Path(os.environ.get("TOX_WORK_DIR", ROOT / ".tox")) / name
    size = sum(path.stat().st_size for path in where.rglob("*") if path.is_file() and not path.is_symlink())
    if arguments.delete:
        shutil.rmtree(where, ignore_errors=True)
    summaries = [line for line in said.splitlines() if re.search(r"\d+ (passed|failed).* in [\d.]+s", line)]
    failures = [line for line in said.splitlines() if re.match(r"(FAILED|ERROR|SKIPPED|XFAIL) ", line)]
    try:
        race, _ = json.JSONDecoder().raw_decode(raced.stdout, raced.stdout.index("{"))  # tox prints a line after it
    except ValueError:
        race = {"failed": True, "said": (raced.stdout + raced.stderr)[-2000:]}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {
        "name": name,
        "commit": commit.stdout.strip(),
        "passed": tested.returncode == 0,
        "tests": " ".join(f"{n} {what}" for n, what in COUNTS.findall(summaries[-1])) if summaries else said[-2000:],
        "notes": failures,
        "seconds": seconds,
        "bytes": size,
        "race": race,
    }


def tox(command: str, *options: str) -> list[str]:
    """The command line of tox for this project."""
    return [sys.executable, "-m", "tox", command, "--root", str(ROOT), "-c", str(ROOT / "tox.ini"), *options]


def page(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The lines of the page: a table of all environments, and the race of each."""
    yield INTRODUCTION
    yield "| environment | Python | torch | transformers | sentence-transformers | tests | s | GB | threads | pool |"
    yield "|---|---|---|---|---|---|---:|---:|---|---|"
    for result in results:
        race = result["race"]
        versions = race.get("versions", {})
        numbers = [versions.get(name, "") for name in ("python", "torch", "transformers", "sentence-transformers")]
        threads = "affected" if race.get("affected") else "not affected" if "affected" in race else "did not run"
        pool = "did not run" if "cases" not in race else "**went wrong**" if race["failed"] else "0 of each"
        told = re.sub(r" \d+ deselected", "", result["tests"])
        tests = told if result["passed"] else f"**{told}**"
        cost = [f"{result['seconds']:.0f}", f"{result['bytes'] / 1e9:.1f}"]
        yield f"| {' | '.join([result['name'], *numbers, tests, *cost, threads, pool])} |"
    seconds, size = sum(r["seconds"] for r in results), sum(r["bytes"] for r in results)
    yield ""
    yield f"Commits: {', '.join(sorted({result.get('commit', 'before they were noted') for result in results}))}."
    yield f"In all {seconds / 60:.0f} minutes, one after another, and {size / 1e9:.0f} GB if all are kept."
    for result in results:
        yield from ("", f"## {result['name']}", "")
        if "cases" not in result["race"]:
            yield from ("```", result["race"].get("said", "").strip(), "```")
            continue
        yield "| | | tries | errors | wrong dtypes | wrong scores | hangs | poisoned |"
        yield "|---|---|---:|---:|---:|---:|---:|---:|"
        for case in result["race"]["cases"]:
            if case["absent"]:
                yield f"| {case['who']} | {case['what']} | none in this version | | | | | |"
                continue
            counts = [case["tries"], sum(case["errors"].values())]
            counts += [case[name] for name in ("wrong_dtypes", "wrong_scores", "hangs")]
            cells = [case["who"], case["what"], *map(str, counts), f"{case['poisoned']} of {case['rounds']}"]
            yield f"| {' | '.join(cells)} |"
        kinds: dict[str, int] = {}
        for case in result["race"]["cases"]:
            for kind, count in (*case["errors"].items(), *(("afterwards: " + k, n) for k, n in case["poison"].items())):
                kinds[kind] = kinds.get(kind, 0) + count
        if kinds:
            yield ""
        yield from (f"- {count} x {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
        notes = [line for line in result["notes"] if not NOT_HERE.search(line)]
        if notes:
            yield from ("", "Of the tests:", "")
            yield from (f"- `{line}`" for line in notes)
