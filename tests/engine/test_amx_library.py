"""The kernels for CPUs with AMX: loaded where they can compute, and elsewhere a reason why not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("torch")
from mp_rerank._engine.amx import library

BUILT = pytest.mark.skipif(not library.PATH.exists(), reason="the kernels are not built here")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of the library's own, empty."""
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(library, "PATH", tmp_path / library.PATH.name)
    library._load.cache_clear()
    yield tmp_path
    library._load.cache_clear()


def run(code: str, **environment: str) -> str:
    """What a new process prints. OpenMP and torch are loaded once in a process."""
    ended = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


# Where there is none, or not the right one.


@pytest.mark.parametrize(("cpu", "reason"), [(True, "built without kernels"), (False, "this CPU has no AMX")])
def test_a_library_that_was_not_built(kernels: Path, monkeypatch: pytest.MonkeyPatch, cpu: bool, reason: str) -> None:
    monkeypatch.setattr(library, "_cpu_has_amx", lambda: cpu)
    assert library.find_library() is None
    assert library.why_not().startswith(reason)


def test_a_broken_library(kernels: Path) -> None:
    library.PATH.write_bytes(b"no library")
    assert library.find_library() is None
    assert library.why_not().startswith("the kernels cannot be loaded: ")


@BUILT
def test_a_library_of_older_sources(kernels: Path) -> None:
    """A checkout that was updated and not built again."""
    folder = Path(library.__file__).parent
    for file in folder.iterdir():
        if file.suffix in (".cpp", ".h", ".so"):
            shutil.copy(file, kernels)
    assert "other sources" not in library.why_not()
    with open(kernels / "tiles.h", "a") as header:
        header.write("// changed\n")
    library._load.cache_clear()
    assert library.find_library() is None
    assert library.why_not() == "the kernels were built of other sources than these: build them again"


def test_a_library_without_one_of_the_functions(kernels: Path) -> None:
    """One of another version, or any other library by this name."""
    import _ctypes

    shutil.copy(_ctypes.__file__, library.PATH)
    assert library.find_library() is None
    assert "mp_sources" in library.why_not()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
        ("ONEDNN_MAX_CPU_ISA", "avx2"),
        ("DNNL_MAX_CPU_ISA", "AVX2"),
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ATEN_CPU_CAPABILITY", "avx2"),
        ("ATEN_CPU_CAPABILITY", "avx512"),
    ],
)
def test_a_cpu_that_is_held_back(kernels: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """So an older CPU is tried out on a newer one, by what torch and oneDNN heed too."""
    monkeypatch.setenv(name, value)
    assert library.find_library() is None
    assert library.why_not().startswith(f"{name} is {value}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX"), ("ONEDNN_MAX_CPU_ISA", "DEFAULT"), ("ATEN_CPU_CAPABILITY", "fastest")],
)
def test_a_cpu_that_is_not_held_back(kernels: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert name not in library.why_not()


# Where there is one.


@BUILT
def test_a_cpu_with_amx_has_the_kernels() -> None:
    if held_back := library._held_back():
        pytest.skip(held_back)
    if library.find_library() is None:
        assert library.why_not() in library.UNSUPPORTED.values()
        pytest.skip(library.why_not())
    assert library.why_not() == ""


@BUILT
def test_there_is_one_openmp_library() -> None:
    """Two would each have their threads, and both would take all cores."""
    found = run(
        """
import ctypes, re, torch
from mp_rerank._engine.amx import library

def loaded():
    return set(re.findall(r"/\\S*/lib(?:gomp|omp|iomp5)[-.]\\S*", open("/proc/self/maps").read()))

before = loaded()
torch.ones(1)
ctypes.CDLL(str(library.PATH))
print(len(before), len(loaded() | before))
"""
    )
    assert found == "1 1"


@BUILT
def test_without_torch_there_is_no_openmp_library_to_load_it_with() -> None:
    """It links none of its own."""
    found = run(
        f"""
import ctypes
try:
    ctypes.CDLL({str(library.PATH)!r})
except OSError as error:
    print(error)
"""
    )
    assert "undefined symbol" in found


@BUILT
def test_a_fork_computes_as_its_parent_does() -> None:
    """As a template's worker does: the template has computed with one thread, and its worker may have two."""
    if library.find_library() is None:
        pytest.skip(library.why_not())
    found = run(
        """
import os, signal, torch
from mp_rerank._engine.amx.library import find_library

signal.alarm(120)
torch.set_num_threads(1)
torch.manual_seed(0)
kernels = find_library()
rows, depth, columns = 700, 96, 160
bias = torch.randn(columns)

def products(dtype, threads):
    wide = dtype is torch.float32
    torch.manual_seed(1)
    numbers, weight = torch.randn(rows, depth).to(dtype), torch.randn(columns, depth).to(dtype)
    packed = torch.empty(kernels.mp_packed_bytes(columns, depth, wide) + 64, dtype=torch.uint8)
    at = (packed.data_ptr() + 63) // 64 * 64
    kernels.mp_pack(weight.data_ptr(), at, columns, depth, wide, threads)
    output = torch.full((rows, columns), torch.nan, dtype=dtype)
    kernels.mp_linear(
        numbers.data_ptr(), at, bias.data_ptr(), None, output.data_ptr(), rows, depth, columns, wide, 0, threads
    )
    return output, numbers.float() @ weight.float().T + bias

for dtype, limit in ((torch.float32, 1e-4), (torch.bfloat16, 0.4)):
    expected, plain = products(dtype, 1)
    assert (expected.float() - plain).abs().max() < limit, dtype
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        code = 1
        try:
            code = 0 if all(torch.equal(products(dtype, threads)[0], expected) for threads in (1, 2, 1)) else 2
        finally:
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert found.split() == ["0", "0"]
