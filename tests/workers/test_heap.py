"""What a worker keeps of the memory that batches have used."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from conftest import PATIENCE, START_METHODS

from mp_rerank import ModelSpec, RerankerPool
from mp_rerank._workers import child, heap
from mp_rerank._workers.child import SLICES_A_TRIM

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt")),
    reason="another C library than glibc",
)
# Of 4 KiB: the system clears so many for a slice of the fake where nothing is kept.
PAGES = 8192


@pytest.mark.parametrize("start_method", START_METHODS)
def test_memory_is_kept_from_slice_to_slice(start_method: str, make_pool: Callable[..., RerankerPool]) -> None:
    spec = ModelSpec(loader="fakes:load_allocating")
    with make_pool(spec, workers=1, start_method=start_method) as pool:
        slices = [
            pool.submit(f"query {i}", ["document"]).result(PATIENCE)[0].relevance_score
            for i in range(SLICES_A_TRIM + 2)
        ]
    cleared = [i for i, pages in enumerate(slices) if pages > PAGES / 100]
    assert set(cleared) <= {0, SLICES_A_TRIM}  # the first one of all, and the first after memory was given back


def test_what_is_kept_is_given_back_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    scored, kept_at = [], []
    monkeypatch.setattr(child, "_model", SimpleNamespace(score=lambda pairs, options: scored.append(pairs)))
    monkeypatch.setattr(child, "_slices", 0)
    monkeypatch.setattr(heap, "keep_memory", lambda: kept_at.append(len(scored)))
    for _ in range(3 * SLICES_A_TRIM):
        child.score([("query", "document")])
    assert kept_at == [0, SLICES_A_TRIM, 2 * SLICES_A_TRIM]


SCRIPT = """
import psutil
from mp_rerank._workers import heap

def used():
    return psutil.Process().memory_info().rss >> 20

heap.keep_memory()
before = used()
blocks = [bytearray(4 << 20) for _ in range(8)]
del blocks
assert used() >= before + 30, (before, used())
huge = bytearray(300 << 20)
del huge
assert used() < before + 60, (before, used())
heap.give_back_memory()
assert used() < before + 8, (before, used())
"""


def test_free_memory_is_given_back() -> None:
    subprocess.run([sys.executable, "-c", SCRIPT], check=True, timeout=PATIENCE)


def test_who_has_set_up_the_c_library_is_left_in_peace() -> None:
    script = SCRIPT.replace(">= before + 30", "< before + 8")
    environ = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "131072"}
    subprocess.run([sys.executable, "-c", script], check=True, timeout=PATIENCE, env=environ)
