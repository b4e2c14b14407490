"""What importing brings along, seen in a fresh interpreter.

``lint-imports`` sees this package's own imports, and not what the libraries that it uses import in turn.

What a working pool never imports is tested with a real model: ``test_the_parent_never_imports_torch``.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from conftest import PATIENCE

# Heavy, and of use to some callers only.
OTHERS = ["dask", "distributed", "httpx", "huggingface_hub", "pandas", "starlette", "uvicorn"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mp_rerank", ["numpy", "psutil", "concurrent.futures", "multiprocessing"]),
        (
            "import mp_rerank; mp_rerank.RerankerPool",
            ["torch", "transformers", "sentence_transformers", "tokenizers", *OTHERS],
        ),
        # Libraries read their numbers of threads when they are first imported: numpy's own among them.
        ("import mp_rerank._workers.child, mp_rerank._workers.process", ["numpy", "torch", "tokenizers", "tqdm"]),
    ],
    ids=["the package", "the pool", "a worker, before its threads are set"],
)
def test_importing_stays_light(statement: str, absent: list[str]) -> None:
    script = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert not set(absent) & set(json.loads(done.stdout))
