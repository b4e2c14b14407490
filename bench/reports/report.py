"""A report: what one run of a command measured, on which machine, with which versions; and its tables.

A report consists of rows. A row is one quantity, measured several times: labels that say what was measured (such as
``{"agents": 8}``), the measure with its unit, and the median, the smallest and the largest of the repetitions. All
commands write rows of this one form, so that ``compare`` can compare any two reports and ``plots`` can draw any.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from bench import ROOT
from mp_rerank._planning.plan import read_machine

__all__ = ["Report", "Row", "number", "quantile", "shown"]

PACKAGES = (
    "mp-rerank",
    "torch",
    "transformers",
    "sentence-transformers",
    "tokenizers",
    "numpy",
    "distributed",
    "onnxruntime",
    "openvino",
    "nncf",
    "fastembed",
    "flashrank",
    "infinity-emb",
)


@dataclass(frozen=True)
class Row:
    """One measured quantity.

    Attributes:
        of: labels that say what was measured; rows with equal labels are one line of a table.
        measure: the quantity, with its unit after a comma (``"p50, ms"``).
        median, low, high: the median, the smallest and the largest of the repetitions.
        repetitions: their number.
        better: ``"higher"``, ``"lower"``, or ``""`` if neither is better.
    """

    of: Mapping[str, Any]
    measure: str
    median: float
    low: float
    high: float
    repetitions: int
    better: str


@dataclass
class Report:
    """One run of one command."""

    command: str
    title: str
    arguments: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, command: str, title: str, options: argparse.Namespace) -> Report:
        """An empty report with today's date. Paths among the arguments are left out: no figure depends on them."""
        arguments = {name: value for name, value in vars(options).items() if not isinstance(value, Path)}
        return cls(command, title, arguments, machine(), versions())

    def add(
        self, of: Mapping[str, Any], measure: str, values: float | Sequence[float], *, better: str = "lower"
    ) -> None:
        """Add a row; ``values`` has one value for each repetition."""
        values = [values] if isinstance(values, (int, float)) else list(values)
        self.rows.append(
            Row(dict(of), measure, statistics.median(values), min(values), max(values), len(values), better)
        )

    def note(self, text: str) -> None:
        """Add a sentence below the tables, and print it."""
        self.notes.append(text)
        print(text, flush=True)

    def value(self, measure: str, **of: Any) -> float:
        """The median of the first row with ``measure`` and these labels; ``KeyError`` if there is none."""
        for row in self.rows:
            if row.measure == measure and of.items() <= row.of.items():
                return row.median
        raise KeyError((measure, of))

    def markdown(self) -> str:
        """The tables, the notes and the machine.

        Rows with the same label names are one table: a line for each set of labels, a column for each measure.
        """
        tables: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            tables.setdefault(tuple(row.of), []).append(row)
        parts = [f"## {self.title}"]
        parts += [_table(labels, rows) for labels, rows in tables.items()]
        parts += self.notes
        parts.append(self.provenance)
        return "\n\n".join(parts) + "\n"

    @property
    def provenance(self) -> str:
        """Machine, versions and command, in a sentence."""
        of = self.machine
        options = " ".join(option(name, value) for name, value in self.arguments.items() if value)
        packages = ", ".join(f"{name} {found}" for name, found in self.versions.items())
        return (
            f"{of['processor']}, {of['cores']} cores ({of['logical']} logical), {of['memory_gib']} GiB; "
            f"{of['system']}, Python {of['python']}; {packages}; {of['date']}; "
            f"`python -m bench {self.command.partition('-')[0]} {options}`"
        )


def option(name: str, value: Any) -> str:
    """An option as it stands on the command line."""
    values = value if isinstance(value, list) else [] if value is True else [value]
    return " ".join((f"--{name.replace('_', '-')}", *map(str, values)))


def machine() -> dict[str, Any]:
    """The machine, as far as figures depend on it, and the date."""
    found = read_machine()
    return {
        "processor": found.cpu_model,
        "logical": found.affinity,
        "cores": found.cores,
        "gpus": list(found.gpus),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load_at_start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    """The versions of those PACKAGES that are installed, and the commit if this is a clone."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            pass
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        found["commit"] = commit.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return found


def quantile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of ``values`` do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def shown(row: Row) -> str:
    """Median and range, as in a cell of a table."""
    if row.repetitions == 1 or row.low == row.high:
        return number(row.median)
    return f"{number(row.median)} ({number(row.low)} to {number(row.high)})"


def number(value: float) -> str:
    """A number with three significant digits."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.1e}"
    return f"{value:.3g}"


def _table(labels: tuple[str, ...], rows: Sequence[Row]) -> str:
    measures = list(dict.fromkeys(row.measure for row in rows))
    lines: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        lines.setdefault(tuple(row.of.values()), {})[row.measure] = shown(row)
    head = f"| {' | '.join((*labels, *measures))} |\n{'|---' * len(labels)}{'|---:' * len(measures)}|"
    body = (
        f"| {' | '.join((*map(str, of), *(cells.get(measure, '') for measure in measures)))} |"
        for of, cells in lines.items()
    )
    return "\n".join((head, *body))
