"""Check what is in the wheel and the sdist that lie in a folder: ``python .ci/check_dist.py FOLDER``."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "mp_rerank").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
# PyPI shows README.md, whose links are relative: what they lead to is in the sdist, also for those who have only that.
LINKED = {link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())}


def faults(folder: Path) -> list[str]:
    """What is missing, and what is there that should not be."""
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {member.name.partition("/")[2] for member in archive.getmembers()}
    in_sdist |= {parent.as_posix() for name in in_sdist for parent in Path(name).parents}
    wanted = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "tox.ini", "tests/fakes.py"}
    wanted |= PACKAGE | LINKED | {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    others = {name for name in in_wheel if not re.match(r"mp_rerank(-[^/]+\.dist-info)?/", name)}
    return [
        *(f"{wheel.name}: {name} is missing" for name in sorted(PACKAGE - in_wheel)),
        *(f"{wheel.name}: {name} should not be there" for name in sorted(others)),
        *(f"{sdist.name}: {name} is missing" for name in sorted(wanted - in_sdist)),
    ]


if __name__ == "__main__":
    if found := faults(Path(sys.argv[1])):
        sys.exit("\n".join(found))
