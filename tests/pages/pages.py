"""The pages of the documentation, and the programs in them.

A block that imports ``mp_rerank`` begins a program; the blocks after it, up to the next that imports, go on with it. A
block whose first line is ``# not run: REASON`` is only compiled. Programs are run from these folders and pages only: on
other pages blocks are parts of something larger.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fakes import EVERY_MODEL

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
WHOLE = ("docs/start.md", "docs/howto/", "docs/from/")
# docs/matrix.md is written by a command.
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    if path.name != "matrix.md"
)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^\s*(?:from|import) mp_rerank\b", re.MULTILINE)
NOT_RUN = "# not run: "

# Every model is the fake one: the pages are about calls, and no model is here but the built-in one.
FAKE = EVERY_MODEL


@dataclass(frozen=True)
class Program:
    """One program of a page.

    Attributes:
        name: of the page and its place there.
        text: what to run.
    """

    name: str
    text: str


def blocks(page: str) -> list[str]:
    return BLOCK.findall((ROOT / page).read_text())


def programs(page: str) -> Iterator[Program]:
    text, number = "", 0
    for block in blocks(page):
        if block.startswith(NOT_RUN):
            continue
        if IMPORT.search(block) and text:
            yield Program(f"{page}:{number}", text)
            text = ""
        number += not text
        text += block
    if text:
        yield Program(f"{page}:{number}", text)


def run(text: str, folder: Path, *, fake: bool, seconds: float) -> str:
    """Run ``text`` as a program in ``folder``; what it prints."""
    (folder / "program.py").write_text((FAKE if fake else "") + text)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    import os

    path = os.pathsep.join([str(ROOT), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "HAYSTACK_TELEMETRY_ENABLED": "False"}
