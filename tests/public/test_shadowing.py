"""A user's file that shadows a module is named in the error that it leads to."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE, START_METHODS

from mp_rerank._shadowing import shadowing

ROOT = Path(__file__).parents[2]

Import = Callable[[str], BaseException]

PROGRAM = """
import sys
from mp_rerank import ModelLoadError, RerankerPool

pool = RerankerPool(devices="cpu", workers=1, start_method=sys.argv[1])
try:
    pool.start()
except ModelLoadError as error:
    print(error.cause)
    print(error.details)
pool.close()
"""


@pytest.fixture
def failing_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Import:
    """Runs a line that imports something, with ``tmp_path`` in front of the standard library; what it raises."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("colorsys", "cachetools", "nobodys"):  # put back afterwards, as it was
        if name in sys.modules:
            monkeypatch.delitem(sys.modules, name)
        else:
            monkeypatch.setitem(sys.modules, name, None)
            del sys.modules[name]

    def run(line: str) -> BaseException:
        with pytest.raises(BaseException) as caught:  # noqa: PT011
            exec(line, {"__name__": "elsewhere"})
        return caught.value

    return run


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "from colorsys import rgb_to_hsv"),
        ("", "import colorsys; colorsys.rgb_to_hsv"),
        ("import no_such_module", "import colorsys"),
        ("raise ValueError('not now')", "import colorsys"),
        ("no python", "import colorsys"),
    ],
)
def test_a_file_in_place_of_the_standard_library_s_is_named(
    content: str, line: str, tmp_path: Path, failing_import: Import
) -> None:
    file = tmp_path / "colorsys.py"
    file.write_text(content)
    assert shadowing(failing_import(line)) == f" ({file} shadows the standard library's module colorsys: rename it)"


def test_so_is_one_in_place_of_a_package(tmp_path: Path, failing_import: Import) -> None:
    file = tmp_path / "cachetools" / "__init__.py"
    file.parent.mkdir()
    file.write_text("")
    error = failing_import("from cachetools import LRUCache")
    assert shadowing(error) == f" ({file} shadows the package cachetools: rename it)"


def test_no_other_error_has_anything_to_do_with_it(tmp_path: Path, failing_import: Import) -> None:
    package = tmp_path / "nobodys"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "colorsys.py").write_text("import no_such_module")  # not at the top
    for line in ("import no_such_module", "import nobodys.colorsys", "from torch import no_such_name"):
        assert shadowing(failing_import(line)) == ""
    (tmp_path / "colorsys.py").write_text("def fail(): raise ValueError('later')")
    importlib.invalidate_caches()
    shadow = importlib.import_module("colorsys")
    with pytest.raises(ValueError, match="later") as caught:
        shadow.fail()
    assert shadowing(caught.value) == "", "it was raised after the import"


def test_of_another_process_that_fails_the_files_in_its_directory_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shadowing() == ""
    for name in ("select", "time", "anything"):  # time is in the interpreter: no file is looked for
        (tmp_path / f"{name}.py").write_text("")
    assert shadowing() == f" ({tmp_path / 'select.py'} shadows the standard library's module select: rename it)"


def test_in_a_directory_that_was_deleted_nothing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_import: Import
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.syspath_prepend("")
    (tmp_path / "gone").rmdir()
    assert shadowing() == shadowing(failing_import("import no_such_module")) == ""


@pytest.mark.parametrize("name", ["logging", "select", "random"])
def test_importing_a_name_of_the_package_says_which_file_is_in_the_way(name: str, tmp_path: Path) -> None:
    (tmp_path / f"{name}.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", "from mp_rerank import RerankerPool; RerankerPool().plan"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    said = done.stderr.strip().splitlines()[-1]
    assert said.startswith("ImportError: mp_rerank.")
    assert said.endswith(f"({tmp_path / name}.py shadows the standard library's module {name}: rename it)")


@pytest.mark.real
@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_s_error_is_the_first_one_and_names_the_file(start_method: str, tmp_path: Path) -> None:
    """To import torch a second time, once it is half imported, fails in another way."""
    pytest.importorskip("torch")
    (tmp_path / "unittest.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, start_method],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    cause, details = done.stdout.split("\n", 1)
    assert cause == (
        "ModuleNotFoundError: No module named 'unittest.mock'; 'unittest' is not a package "
        f"({tmp_path / 'unittest.py'} shadows the standard library's module unittest: rename it)"
    )
    assert "partially initialized" not in details


@pytest.mark.real
def test_so_is_a_file_in_place_of_a_library(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizers.py").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "spawn"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert f"({tmp_path / 'tokenizers.py'} shadows the package tokenizers: rename it)" in done.stdout
