"""Builds the kernels for CPUs with AMX (``mp_rerank/_engine/amx``) into the wheel, where there is a compiler for them.

They are an addition. Without GCC, or on another system, the wheel is of Python alone and fits every system.

    MP_RERANK_KERNELS=required pip wheel .      # an error in place of a wheel without them
    MP_RERANK_KERNELS=0 pip wheel .             # a wheel without them
    python hatch_build.py                       # into a checkout that is run as it lies there, without an installation
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zlib
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # by hand
    BuildHookInterface = object

SOURCES = Path(__file__).parent / "mp_rerank" / "_engine" / "amx"
LIBRARY = SOURCES / "libmp_rerank_amx.so"
SWITCH = "MP_RERANK_KERNELS"
PLATFORM = "linux-x86_64"
# GCC's headers warn falsely by the thousand: -w.
COMPILE = ["-O3", "-std=c++20", "-fPIC", "-fno-exceptions", "-fno-rtti", "-fno-math-errno", "-fopenmp", "-w"]
# Neither an OpenMP library nor the C++ one is linked. A second OpenMP library beside torch's would have threads of its
# own: GOMP_* are left open, and are torch's when the library is loaded after torch. Of C++ only templates are used.
LINK = ["-shared", "-nostdlib", "-Wl,--as-needed"]
LIBRARIES = ["-lm", "-lc"]


class NotBuiltError(Exception):
    """The library was not built; why, in a line."""


def build() -> None:
    """Build the library beside its sources. Raises ``NotBuiltError``."""
    platform = sysconfig.get_platform()
    if platform != PLATFORM:
        raise NotBuiltError(f"they are for {PLATFORM}, and this is {platform}")
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or shutil.which("c++") or ""]
    if compiler == [""]:
        raise NotBuiltError("there is no C++ compiler: GCC 11 or newer is needed")
    with tempfile.TemporaryDirectory() as folder:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = {str(source): os.path.join(folder, source.stem + ".o") for source in sources}
        define = f"-DMP_SOURCES={digest(SOURCES)}u"
        _run(*([*compiler, *COMPILE, define, "-c", source, "-o", made] for source, made in objects.items()))
        # Moved into its place when it is whole: a process that has loaded the one before it keeps that.
        made = SOURCES / f"{os.getpid()}.so"
        try:
            _run([*compiler, *LINK, *objects.values(), *LIBRARIES, "-o", str(made)])
            made.replace(LIBRARY)
        finally:
            made.unlink(missing_ok=True)


def digest(folder: Path) -> int:
    """A number that is another one for other sources. `library.py` computes it too, to know an old library."""
    found = 0
    for source in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        found = zlib.crc32(source.read_bytes(), found)
    return found


def _run(*commands: list[str]) -> None:
    """All at once; raises if one fails."""
    started: list[subprocess.Popen[str]] = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    except OSError as error:
        raise NotBuiltError(f"the C++ compiler {commands[0][0]} cannot be run: {error.strerror}") from None
    finally:
        said = [process.communicate()[1] for process in started]
    for process, words in zip(started, said, strict=True):
        if process.returncode:
            errors = [line for line in words.splitlines() if "error" in line] or words.splitlines() or ["no word"]
            raise NotBuiltError(f"the C++ compiler failed: {errors[0].strip()}")


class KernelsBuildHook(BuildHookInterface):
    """Hatchling asks it before each wheel, also before that of an editable installation."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build the library; then the wheel has it, and is of its platform."""
        wish = os.environ.get(SWITCH, "")
        if wish not in ("", "0", "required"):
            raise ValueError(f"{SWITCH} is 0 or required, or not set; it is {wish!r}")
        if wish == "0":
            return
        try:
            build()
        except NotBuiltError as error:
            if wish == "required":
                raise RuntimeError(f"{SWITCH}=required, and they cannot be built: {error}") from None
            self.app.display_warning(f"Without kernels for CPUs with AMX: {error}")
            return
        # Git ignores it, and so would Hatchling: an artifact. Any Python loads it, by ctypes.
        build_data["artifacts"].append(LIBRARY.relative_to(Path(__file__).parent).as_posix())
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{PLATFORM.replace('-', '_')}"
        self.app.display_info(f"With kernels for CPUs with AMX: {LIBRARY.name}")


if __name__ == "__main__":
    try:
        build()
    except NotBuiltError as error:
        sys.exit(f"not built: {error}")
