"""The benchmarks' own promises: what they write can be read again, and a regression does not go unseen."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import pytest
from conftest import START_METHODS

ROOT = Path(__file__).parents[2]


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)


def modules() -> dict[str, ast.Module]:
    """Every module of ``bench``, by its dotted name."""
    found = {}
    for path in (ROOT / "bench").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[: -1 if parts[-1] == "__init__" else None])] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def test_modules_import_each_other_in_no_circle_not_by_an_import_in_a_function_either() -> None:
    found = modules()
    imports: dict[str, set[str]] = {}
    for name, tree in found.items():
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        named = {node.module for node in nodes}
        named |= {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        imports[name] = (named & found.keys()) - {name}
    assert "bench.reports.report" in imports["bench.reports.plots"]
    TopologicalSorter(imports).prepare()  # raises CycleError


def test_each_command_has_a_module_with_a_main_and_each_room_a_docstring() -> None:
    found = modules()
    [commands] = [
        ast.literal_eval(node.value)
        for node in found["bench.__main__"].body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "COMMANDS"
    ]
    for module, _ in commands.values():
        assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in found[module].body), module
    assert [name for name, tree in found.items() if not ast.get_docstring(tree)] == []
    listed = bench("--help")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stderr.splitlines() if line.startswith("  ")] == list(commands)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a result file with one row for each quantity named: (median, low, high, better)."""

    def write(folder: str, **quantities: tuple[float, float, float, str]) -> Path:
        rows = [
            {"of": {"agents": 8}, "measure": name.replace("_", " "), "median": median, "low": low, "high": high}
            | {"repetitions": 3, "better": better}
            for name, (median, low, high, better) in quantities.items()
        ]
        content = {"command": "made-up", "title": "", "arguments": {}, "machine": {}, "versions": {}, "notes": []}
        path = tmp_path / folder / "made-up.json"
        path.parent.mkdir()
        path.write_text(json.dumps({**content, "rows": rows}))
        return path

    return write


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ((100.0, 95.0, 105.0, "higher"), (80.0, 75.0, 85.0, "higher"), "worse"),
        ((100.0, 95.0, 105.0, "higher"), (125.0, 120.0, 130.0, "higher"), "better"),
        ((100.0, 95.0, 105.0, "lower"), (125.0, 120.0, 130.0, "lower"), "worse"),
        ((100.0, 95.0, 105.0, "lower"), (80.0, 75.0, 85.0, "lower"), "better"),
        ((100.0, 60.0, 105.0, "higher"), (80.0, 75.0, 85.0, "higher"), ""),  # as some of the old repetitions were
        ((100.0, 99.0, 101.0, "higher"), (95.0, 94.0, 96.0, "higher"), ""),  # within the threshold
        ((100.0, 95.0, 105.0, ""), (10.0, 9.0, 11.0, ""), ""),  # neither better nor worse
        ((1.0, 1.0, 1.0, "lower"), (0.0, 0.0, 0.0, "lower"), "better"),
        ((0.0, 0.0, 0.0, "lower"), (1.0, 1.0, 1.0, "lower"), "worse"),
    ],
)
def test_a_change_beyond_the_spread_is_told(
    write: Callable[..., Path], old: tuple[Any, ...], new: tuple[Any, ...], verdict: str
) -> None:
    before = write("old", some_rate=old, same=(5.0, 4.0, 6.0, "lower"), gone=(1.0, 1.0, 1.0, "lower"))
    after = write("new", some_rate=new, same=(5.0, 4.0, 6.0, "lower"))
    done = bench("compare", before, after)
    assert done.stderr == ""
    assert done.returncode == (1 if verdict == "worse" else 0)
    lines = [line for line in done.stdout.splitlines() if "some rate" in line]
    assert [line.split("|")[-2].strip() for line in lines] == ([verdict] if verdict else [])
    assert "made-up: 8: gone" in done.stdout


def test_folders_are_compared_by_a_threshold_of_one_s_own(write: Callable[..., Path]) -> None:
    before, after = write("old", rate=(100.0, 99.0, 101.0, "higher")), write("new", rate=(80.0, 79.0, 81.0, "higher"))
    assert bench("compare", before.parent, after.parent).returncode == 1
    assert bench("compare", before.parent, after.parent, "--threshold", "0.3").returncode == 0


def test_nothing_in_common_is_no_success(write: Callable[..., Path]) -> None:
    done = bench("compare", write("old", a=(1.0, 1.0, 1.0, "")), write("new", b=(1.0, 1.0, 1.0, "")))
    assert done.returncode == 2
    assert "no row in common" in done.stderr


def test_growth_is_measured_without_torch(tmp_path: Path) -> None:
    methods = ["spawn", *START_METHODS[2:]]
    done = bench("growth", "--workers", "1", "2", "--methods", *methods, "--rounds", "1", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "growth.json").read_text())["rows"]
    assert {(row["of"]["start method"], row["of"]["workers"]) for row in rows} == {
        (m, n) for m in methods for n in (1, 2)
    }


def test_the_machinery_is_measured_without_torch(tmp_path: Path) -> None:
    small = ["--rounds", "2", "--out", tmp_path]
    scale = ["scale", "--slots", "1", "2", "--pending", "1", "30", "--slices", "3", "--milliseconds", "5"]
    latency = ["latency", "--no-model", "--requests", "8", "--agents", "2", "--workers", "1"]
    for command in (scale, latency):
        done = bench(*command, *small)
        assert done.returncode == 0, done.stderr
        report = json.loads((tmp_path / f"{command[0]}.json").read_text())
        assert (report["command"], report["machine"]["cores"] > 0) == (command[0], True)
        assert all(row["low"] <= row["median"] <= row["high"] for row in report["rows"])
        measures = {(row["measure"], *row["of"].values()) for row in report["rows"]}
        table = (tmp_path / f"{command[0]}.md").read_text()
        assert all(measure in table for measure, *_ in measures)
        if command is scale:
            assert {("efficiency, %", 1), ("efficiency, %", 2), ("one more submit, µs", 30)} <= measures
        else:
            assert {("p99, ms", "mp_rerank", 10), ("p50, ms", "ProcessPoolExecutor(1)", 1)} <= measures
    same = bench("compare", tmp_path, tmp_path)
    assert same.returncode == 0
    assert "0 worse, 0 better; 0 in one run only" in same.stdout
    assert bench("suite", "--page", "--out", tmp_path).returncode == 0
    page = (tmp_path / "README.md").read_text()
    assert all((tmp_path / f"{name}.md").read_text().strip() in page for name in ("scale", "latency"))
