"""A report's files: JSON, which ``read`` reads again, Markdown tables, and a picture where matplotlib is installed."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from bench import ROOT
from bench.reports.report import Report, Row

__all__ = ["RESULTS", "add_output", "draw", "finish", "read", "save"]

RESULTS = ROOT / "bench" / "results"


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add the option `--out`, which every command with a report has."""
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for JSON, Markdown and pictures")


def save(report: Report, out: Path) -> None:
    """Write ``report`` into ``out`` as JSON and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{report.command}.json").write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
    (out / f"{report.command}.md").write_text(report.markdown(), encoding="utf-8")


def finish(report: Report, out: Path) -> None:
    """Save ``report``, print its tables, and draw it."""
    save(report, out)
    print(report.markdown())
    draw(report, out)


def draw(report: Report, out: Path) -> None:
    """Draw ``report`` into ``out``, if matplotlib is installed."""
    try:
        from bench.reports import plots
    except ImportError as error:
        print(f"no pictures: {error}")
    else:
        plots.draw(report, out)


def read(path: Path) -> Report:
    """The report in a JSON file that ``save`` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Report(**{**content, "rows": [Row(**row) for row in content["rows"]]})
