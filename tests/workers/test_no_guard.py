"""No ``if __name__ == "__main__":`` is needed, wherever the code runs; and no pool can multiply itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import PATIENCE

from mp_rerank import ModelLoadError, ModelSpec, RerankerPool

TESTS = Path(__file__).parents[1]

PROGRAM = """
import os
with open(os.environ["RUNS"], "a") as runs:
    runs.write("run\\n")
from mp_rerank import ModelSpec, RerankerPool
pool = RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=2)
print(len(pool.submit("query", ["a", "b", "c"]).result()))
pool.close()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": path, "RUNS": str(tmp_path / "runs")}


def run(environment: dict[str, str], *arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, input=text, capture_output=True, text=True, timeout=PATIENCE
    )


@pytest.mark.parametrize("way", ["script", "module", "command", "standard input"])
def test_the_main_module_runs_once_and_not_in_the_workers(
    way: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "unguarded.py"
    script.write_text(PROGRAM)
    environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    if way == "script":
        done = run(environment, str(script))
    elif way == "module":
        done = run(environment, "-m", "unguarded")
    elif way == "command":
        done = run(environment, "-c", PROGRAM)
    else:
        done = run(environment, "-", text=PROGRAM)
    assert (done.stdout, done.stderr) == ("3\n", "")
    assert (tmp_path / "runs").read_text() == "run\n"


@pytest.mark.filterwarnings("ignore")
def test_a_notebook(tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for name in ("PYTHONPATH", "RUNS"):
        monkeypatch.setenv(name, environment[name])
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(PROGRAM)])
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata["kernelspec"] = kernel
    nbclient.NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3").execute(cwd=str(tmp_path))
    outputs = notebook.cells[0].outputs
    assert [(o.output_type, o.get("name"), o.get("text")) for o in outputs] == [("stream", "stdout", "3\n")]
    assert (tmp_path / "runs").read_text() == "run\n"


def test_another_library_s_child_that_runs_an_unguarded_main_is_told_so(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "unguarded.py"
    start_child = """
import multiprocessing, os
if "IN_CHILD" not in os.environ:
    os.environ["IN_CHILD"] = "yes"
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    print("child ended with", child.exitcode)
"""
    script.write_text(start_child + PROGRAM)
    done = run(environment, str(script))
    assert "RuntimeError: a RerankerPool cannot be started while a multiprocessing child is importing" in done.stderr
    assert 'if __name__ == "__main__":' in done.stderr
    assert done.stdout == "child ended with 1\n3\n"


def test_a_pool_inside_a_worker_is_refused(make_pool: Callable[..., RerankerPool]) -> None:
    with pytest.raises(ModelLoadError, match="RuntimeError: this is a worker of a RerankerPool"):
        make_pool(ModelSpec("nested", loader="nested:load"), workers=1).start()


def test_a_daemonic_process_is_told_why_it_may_have_no_pool(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "daemonic.py").write_text(
        """
from mp_rerank import ModelSpec, RerankerPool

def use():
    try:
        RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu").start()
    except RuntimeError as error:
        print(error)
    with RerankerPool(ModelSpec("fake", loader="fakes:load"), isolation="thread") as pool:
        print("and there it scores", len(pool.rerank("query", ["a", "b", "c"])))
"""
    )
    script = tmp_path / "guarded.py"
    script.write_text(
        """
import multiprocessing, daemonic
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=daemonic.use, daemon=True)
    child.start()
    child.join()
"""
    )
    done = run(environment, str(script))
    assert "daemonic process" in done.stdout
    assert 'isolation="thread" works here' in done.stdout
    assert done.stdout.endswith("and there it scores 3\n")
