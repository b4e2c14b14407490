"""Run the cases, add up their results, and print them. Exit codes:

0   nothing went wrong, with threads that use a ``CrossEncoder`` or with the pool
1   the pool went wrong, or loading one after another did, which makes the threads' results meaningless
2   the command line is wrong
3   threads with a ``CrossEncoder`` went wrong and the pool did not: this environment is affected
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mp_rerank
from mp_rerank.race.rounds import REFERENCE, kill_tree

__all__ = ["AFFECTED", "FAILED", "Case", "Report", "race", "run", "run_module", "versions"]

FAILED = 1
AFFECTED = 3

SERIAL, THREADS, POOL = "one after another", "CrossEncoder in threads", "RerankerPool in threads"
# Case -> (who loads and scores, what they do), in the order of the table.
CASES = {
    "control": (SERIAL, "each loads one"),
    "load": (THREADS, "each loads one"),
    "dtypes": (THREADS, "each loads one, half in bfloat16"),
    "models": (THREADS, "each loads one, of two models"),
    "predict": (THREADS, "all score with one"),
    "activations": (THREADS, "all score with one, half as logits"),
    "library-pool": (THREADS, "all score through its process pool"),
    "library-pool-one-chunk": (THREADS, "the same, a call in one chunk"),
    "pool": (POOL, "all start one and score"),
    "pools": (POOL, "the same, of three at once"),
}
COLUMNS = ("tries", "errors", "dtypes", "scores", "hangs", "poisoned")
# The limit of a subprocess that runs several cases. It has its own, shorter limits for what hangs in it.
LIMIT_SECONDS = 3600.0


@dataclass
class Case:
    """What went wrong in all rounds of one case."""

    name: str
    who: str
    what: str
    rounds: int = 0
    tries: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong_dtypes: int = 0
    wrong_scores: int = 0
    hangs: int = 0
    poisoned: int = 0  # number of rounds
    poison: Counter[str] = field(default_factory=Counter)  # what went wrong after a round -> number of rounds
    altered: Counter[str] = field(default_factory=Counter)
    absent: bool = False  # this version of the library has no such function

    def add(self, said: Mapping[str, Any], threads: int) -> None:
        """Add a line of JSON: a round's result, or the failure of its process."""
        if "absent" in said:
            self.absent = True
            return
        self.rounds += 1
        if "failure" in said:
            self.tries += threads
            if said["failure"] == "hung":
                self.hangs += threads
            else:
                self.errors[said["failure"]] += 1
            return
        self.tries += said["tries"]
        self.errors.update(said["errors"])
        self.wrong_dtypes += said["wrong_dtypes"]
        self.wrong_scores += said["wrong_scores"]
        self.hangs += said["hangs"]
        self.poisoned += bool(said["poison"])
        self.poison.update(said["poison"])
        self.altered.update(said["altered"])

    @property
    def clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.errors or self.wrong_dtypes or self.wrong_scores or self.hangs or self.poisoned)

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of the table, under ``COLUMNS``."""
        if not self.rounds:
            return ("none" if self.absent else "not run",) + ("",) * (len(COLUMNS) - 1)
        counts = (self.tries, self.errors.total(), self.wrong_dtypes, self.wrong_scores, self.hangs)
        return (*map(str, counts), f"{self.poisoned} of {self.rounds}")


@dataclass
class Report:
    """A whole run."""

    versions: dict[str, str]
    threads: int
    rounds: int
    cases: list[Case]
    seconds: float

    @property
    def affected(self) -> bool:
        """Whether threads with a ``CrossEncoder`` went wrong."""
        return any(not case.clean for case in self.cases if case.who == THREADS)

    @property
    def failed(self) -> bool:
        """Whether the pool went wrong, or the control."""
        return any(not case.clean for case in self.cases if case.who != THREADS)

    @property
    def exit_code(self) -> int:
        """See the module's docstring."""
        return FAILED if self.failed else AFFECTED if self.affected else 0

    def as_json(self) -> dict[str, Any]:
        """Everything, with the verdict."""
        # Not dataclasses.asdict: before Python 3.12 it copies a Counter wrongly.
        verdict = {"affected": self.affected, "failed": self.failed, "exit_code": self.exit_code}
        return {**vars(self), "cases": [vars(case) for case in self.cases], **verdict}

    def as_text(self) -> str:
        """The table, the errors behind its counts, and the verdict."""
        lines = [
            ", ".join(f"{name} {number}" for name, number in self.versions.items()),
            f"{self.threads} threads, {self.rounds} rounds, {self.seconds:.0f} s",
            "",
        ]
        width = max(len(case.what) for case in self.cases) + 2
        who = ""
        for case in self.cases:
            if case.who != who:
                if who:
                    lines.append("")
                who = case.who
                lines.append(f"{who:<{width}}" + "".join(f"{name:>10}" for name in COLUMNS))
            lines.append((f"  {case.what:<{width - 2}}" + "".join(f"{cell:>10}" for cell in case.row)).rstrip())
        lines.append("")
        for case in self.cases:
            details = [
                *(f"{count} x {kind}" for kind, count in case.errors.most_common()),
                *(
                    f"afterwards, in {count} of {case.rounds} rounds: {what}"
                    for what, count in case.poison.most_common()
                ),
                *(f"left behind in {count} of {case.rounds} rounds: {what}" for what, count in case.altered.items()),
            ]
            if details:
                lines += [f"{case.who}, {case.what}:", *(f"  {detail}" for detail in details)]
        if lines[-1]:
            lines.append("")
        lines.append(self.verdict)
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if self.failed:
            return "RerankerPool, or loading one after another, went wrong here."
        if self.affected:
            return "Affected: threads with a CrossEncoder went wrong here. RerankerPool did not."
        return "Not affected: nothing went wrong here, with threads or with RerankerPool."


def race(
    threads: int = 8,
    rounds: int = 3,
    *,
    limit: float = LIMIT_SECONDS,
    tell: Callable[[str], None] = lambda _: None,
) -> Report:
    """Run every case.

    Args:
        threads: the number of threads that race.
        rounds: how often each case runs; a process that a round left unfit is replaced before the next.
        limit: seconds for a subprocess with several cases; then it counts as hung and is killed.
        tell: called with a line for each subprocess that begins.
    """
    start = time.monotonic()
    cases = {name: Case(name, who, what) for name, (who, what) in CASES.items()}
    with tempfile.TemporaryDirectory(prefix="mp_rerank_race_") as folder:
        for module, kinds in (("cases", (SERIAL, THREADS)), ("pools", (POOL,))):
            mine = [case for case in cases.values() if case.who in kinds]
            tell(", ".join(kinds))
            lines, failure = run_module(f"mp_rerank.race.{module}", [folder, str(threads), str(rounds)], limit)
            for line in lines:
                said = json.loads(line)
                cases[said["case"]].add(said, threads)
            if failure:
                missing = [case for case in mine if not case.rounds and not case.absent] or mine[-1:]
                missing[0].add({"failure": failure}, threads)
            if not (Path(folder) / REFERENCE).is_file():
                break  # the control failed: there are no scores to compare with
    return Report(versions(), threads, rounds, list(cases.values()), time.monotonic() - start)


def versions() -> dict[str, str]:
    """The versions of Python, this package and the libraries that race."""
    found = {"python": platform.python_version(), "mp-rerank": mp_rerank.__version__}
    for name in ("torch", "transformers", "sentence-transformers", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def run_module(module: str, arguments: list[str], limit: float) -> tuple[list[str], str]:
    """Run ``python -m MODULE``, offline and with one thread for each computation.

    Returns the lines that it printed, and ``"hung"`` if it took more than ``limit`` seconds and was killed, a line that
    says how it failed, or nothing.
    """
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(mp_rerank.__file__).parent.parent), os.environ.get("PYTHONPATH")])
        ),
    }
    environment.pop("PYTHONWARNINGS", None)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", module, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        out, err = process.communicate(timeout=limit)
        failure = ""
        if process.returncode:
            said = err.strip().splitlines()
            failure = f"the process ended with {process.returncode}: {said[-1][:200] if said else ''}"
        return out.splitlines(), failure
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        out, _ = process.communicate()
        return out.splitlines(), "hung"
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.communicate()


def run(arguments: argparse.Namespace) -> int:
    """The command: print the report, return the exit code."""
    for name, least in (("threads", 2), ("rounds", 1)):
        if getattr(arguments, name) < least:
            raise ValueError(f"--{name}: at least {least} is needed, not {getattr(arguments, name)}")

    def tell(line: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)

    report = race(arguments.threads, arguments.rounds, tell=tell)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    print(json.dumps(report.as_json(), indent=2) if arguments.json else report.as_text())
    return report.exit_code
