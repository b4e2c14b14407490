"""The kernels as one shared library: loaded, or why it is not."""

from __future__ import annotations

import ctypes
import os
import zlib
from functools import cache
from pathlib import Path

# Before the library is loaded: of OpenMP it has no more than names, which are then found in the one library that torch
# has loaded for the whole process. So there is one set of threads. Without torch it cannot be loaded.
import torch

__all__ = ["DTYPES", "find_library", "is_wide", "why_not"]

PATH = Path(__file__).with_name("libmp_rerank_amx.so")
ADDRESS, COUNT, FLAG, NUMBER = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
#: function -> what it returns and takes; see the C++ sources
SIGNATURES = {
    "mp_sources": (ctypes.c_uint, []),
    "mp_unsupported": (FLAG, []),
    "mp_packed_bytes": (COUNT, [COUNT, COUNT, FLAG]),
    "mp_pack": (None, [ADDRESS, ADDRESS, COUNT, COUNT, FLAG, FLAG]),
    "mp_linear": (None, [ADDRESS] * 5 + [COUNT] * 3 + [FLAG] * 3),
    "mp_feed_forward": (None, [ADDRESS] * 7 + [COUNT] * 4 + [FLAG] * 3),
    "mp_side_by_side": (None, [ADDRESS] * 5 + [COUNT] * 3 + [FLAG] * 2),
    "mp_norm": (None, [ADDRESS] * 6 + [COUNT] * 2 + [NUMBER] + [FLAG] * 3),
    "mp_rotate": (None, ([ADDRESS] + [COUNT] * 3) * 2 + [ADDRESS] * 2 + [COUNT] * 2 + [FLAG] * 2),
    "mp_attention": (None, [ADDRESS] * 6 + [COUNT, ADDRESS] + [COUNT] * 3 + [NUMBER] + [COUNT] * 2 + [FLAG] * 2),
}
#: the numbers that the kernels know
DTYPES = (torch.float32, torch.bfloat16)
UNSUPPORTED = {1: "this CPU has no AMX", 2: "this system gives this process no AMX"}
#: what torch's own kernels can be held back to; other values it ignores
ATEN_CAPABILITIES = ("default", "avx2", "avx512")


def find_library() -> ctypes.CDLL | None:
    """The library, where it can compute; see `why_not`."""
    return _load()[0]


def why_not() -> str:
    """Why there is no library; empty: there is."""
    return _load()[1]


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if held_back := _held_back():
        return None, held_back
    if not PATH.exists():
        if not _cpu_has_amx():
            return None, UNSUPPORTED[1]
        return None, "built without kernels, for which Linux and GCC 11 or newer are needed"
    try:
        library = ctypes.CDLL(str(PATH))
        for name, (result, arguments) in SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return None, f"the kernels cannot be loaded: {error}"
    if (sources := _digest(PATH.parent)) and library.mp_sources() != sources:
        return None, "the kernels were built of other sources than these: build them again"
    unsupported = library.mp_unsupported()
    return (None, UNSUPPORTED[unsupported]) if unsupported else (library, "")


def _held_back() -> str:
    """What holds oneDNN back from AMX, or torch to an older CPU's instructions, holds these kernels back too."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        most = os.environ.get(name, "")
        if most and "AMX" not in most.upper() and most.upper() not in ("DEFAULT", "ALL"):
            return f"{name} is {most}"
    most = os.environ.get("ATEN_CPU_CAPABILITY", "")
    return f"ATEN_CPU_CAPABILITY is {most}" if most in ATEN_CAPABILITIES else ""


def _cpu_has_amx() -> bool:
    """Whether Linux lists it; asked where there is no library, which would ask the CPU."""
    try:
        with open("/proc/cpuinfo") as lines:
            return "amx_bf16" in next((line for line in lines if line.startswith("flags")), "")
    except OSError:
        return False


def _digest(folder: Path) -> int:
    """The number of the sources in a folder, as `hatch_build.py` makes it; 0: there are none."""
    found = 0
    for source in sorted([*folder.glob("*.cpp"), *folder.glob("*.h")]):
        found = zlib.crc32(source.read_bytes(), found)
    return found


def is_wide(tensor: torch.Tensor) -> bool:
    """Whether its numbers are of float32, not bfloat16."""
    return tensor.dtype is torch.float32
