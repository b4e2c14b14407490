"""`python -m bench compare OLD NEW`: compare two reports of one command, or two folders of reports.

A row got worse if its median did by more than the threshold and if the ranges of its repetitions do not overlap. (Other
load on a machine moves medians, but seldom every single repetition.) Rows that only one report has are listed and not
judged.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.reports.files import read
from bench.reports.report import Row, shown


@dataclass(frozen=True)
class Change:
    """One quantity in both reports; ``ratio`` is new over old."""

    command: str
    old: Row
    new: Row
    threshold: float

    @property
    def ratio(self) -> float:
        if self.old.median == 0:
            return 1.0 if self.new.median == 0 else float("inf")
        return self.new.median / self.old.median

    @property
    def verdict(self) -> str:
        """``"worse"``, ``"better"``, or ``""`` for no clear change."""
        if not self.old.better or max(self.ratio, 1 / max(self.ratio, 1e-12)) <= 1 + self.threshold:
            return ""
        if self.new.low <= self.old.high and self.old.low <= self.new.high:
            return ""
        rose = self.new.median > self.old.median
        return "better" if rose == (self.old.better == "higher") else "worse"


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 if anything got worse."""
    parser = argparse.ArgumentParser(
        prog="python -m bench compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="a result's JSON file, or a folder of them")
    parser.add_argument("new", type=Path, help="the same, of the later run")
    parser.add_argument("--threshold", type=float, default=0.1, help="share by which a median may be worse")
    parser.add_argument("--all", action="store_true", help="list what did not change, too")
    options = parser.parse_args(argv)
    changes: list[Change] = []
    unmatched: list[str] = []
    for old, new in pairs_of_files(options.old, options.new):
        found, missing = compare(old, new, options.threshold)
        changes += found
        unmatched += missing
    if not changes:
        parser.error(f"{options.old} and {options.new} have no row in common")
    print("| what | old | new | new / old | |\n|---|---:|---:|---:|---|")
    for change in changes:
        if change.verdict or options.all:
            of = ", ".join(f"{value}" for value in change.old.of.values())
            print(
                f"| {change.command}: {of}: {change.old.measure} | {shown(change.old)} | {shown(change.new)} "
                f"| {change.ratio:.2f} | {change.verdict} |"
            )
    worse, better = (sum(change.verdict == verdict for change in changes) for verdict in ("worse", "better"))
    print(f"\n{len(changes)} compared: {worse} worse, {better} better; {len(unmatched)} in one run only")
    for line in unmatched:
        print(f"  {line}")
    return int(worse > 0)


def pairs_of_files(old: Path, new: Path) -> Iterator[tuple[Path, Path]]:
    """The pairs of files to compare: the two given, or the files that both folders have."""
    if not old.is_dir():
        yield old, new / old.name if new.is_dir() else new
        return
    for path in sorted(old.glob("*.json")):
        if (new / path.name).is_file():
            yield path, new / path.name


def compare(old: Path, new: Path, threshold: float) -> tuple[list[Change], list[str]]:
    """The changes of rows that both reports have, and the names of rows that one has."""
    before, after = read(old), read(new)
    for name in ("processor", "cores", "python"):
        if before.machine.get(name) != after.machine.get(name):
            print(f"{before.command}: not the same {name}: {before.machine.get(name)}, {after.machine.get(name)}")
    rows = [{(tuple(row.of.items()), row.measure): row for row in report.rows} for report in (before, after)]
    changes = [Change(before.command, row, rows[1][key], threshold) for key, row in rows[0].items() if key in rows[1]]
    missing = [
        f"{before.command}: {', '.join(str(value) for _, value in of)}: {measure}"
        for of, measure in rows[0].keys() ^ rows[1].keys()
    ]
    return changes, sorted(missing)
