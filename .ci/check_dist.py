"""Check what is in the wheel and the sdist that lie in a folder: ``python .ci/check_dist.py FOLDER``."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "mp_rerank").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
}
# The kernels for CPUs with AMX: built into the wheel where they can be, which then is of this platform.
KERNELS = "mp_rerank/_engine/amx/libmp_rerank_amx.so"
CAN_BE_BUILT = sysconfig.get_platform() == "linux-x86_64" and shutil.which("g++") is not None
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
    wanted.add("hatch_build.py")
    wanted |= PACKAGE | LINKED | {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    others = {name for name in in_wheel if not re.match(r"mp_rerank(-[^/]+\.dist-info)?/", name)}
    tag = "py3-none-linux_x86_64" if CAN_BE_BUILT else "py3-none-any"
    return [
        *(f"{wheel.name}: {name} is missing" for name in sorted(PACKAGE - in_wheel)),
        *(f"{wheel.name}: {name} should not be there" for name in sorted(others)),
        *([f"{wheel.name}: its tag is not {tag}"] if not wheel.stem.endswith(f"-{tag}") else []),
        *([f"{wheel.name}: {KERNELS} is missing"] if CAN_BE_BUILT and KERNELS not in in_wheel else []),
        *([f"{sdist.name}: {KERNELS} should not be there"] if KERNELS in in_sdist else []),
        *(f"{sdist.name}: {name} is missing" for name in sorted(wanted - in_sdist)),
    ]


if __name__ == "__main__":
    if found := faults(Path(sys.argv[1])):
        sys.exit("\n".join(found))
