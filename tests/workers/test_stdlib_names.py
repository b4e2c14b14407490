"""The private names of the standard library: one list has them all, and says what goes without each."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE

import mp_rerank
from mp_rerank._workers.stdlib_names import EVERYWHERE, FORKSERVER, PrivateName, check, missing

if os.name != "posix":
    pytest.skip("half of the names are of POSIX systems", allow_module_level=True)

PACKAGE = Path(mp_rerank.__file__).parent
TESTS = Path(__file__).parents[1]
# Documented, for all their underscore; or of a package other than the standard library.
DOCUMENTED = {"_exit", "_fields", "_getframe", "_id"}
OTHERS = {"_engine", "race", "integrations"}


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def used() -> dict[str, str]:
    """The private attributes that the package uses and does not define: each with one place."""
    found, ours = {}, set()
    for path in sorted(PACKAGE.rglob("*.py")):
        foreign = OTHERS & set(path.relative_to(PACKAGE).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                ours.add(node.id if isinstance(node, ast.Name) else node.attr)
            elif isinstance(node, ast.Attribute) and not foreign:
                found[node.attr] = f"{path.relative_to(PACKAGE)}:{node.lineno}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and not foreign:
                name = node.args[1]
                if isinstance(name, ast.Constant) and isinstance(name.value, str):
                    found[name.value] = f"{path.relative_to(PACKAGE)}:{node.lineno}"
    return {name: where for name, where in found.items() if private(name) and name not in ours | DOCUMENTED}


def test_the_list_has_every_private_name_that_is_used() -> None:
    listed = {part for name in EVERYWHERE + FORKSERVER for part in name.name.split("|")}
    unlisted = {name: where for name, where in used().items() if name not in listed}
    assert not unlisted, f"add to mp_rerank/_workers/stdlib_names.py: {unlisted}"


def test_this_python_has_them_all() -> None:
    assert missing(EVERYWHERE + FORKSERVER) == []


def test_one_that_nothing_works_without_is_an_error_that_names_it() -> None:
    gone = PrivateName("concurrent.futures.Future", "_gone", "something")
    with pytest.raises(ImportError, match=r"a worker needs concurrent\.futures\.Future\._gone, which Python 3"):
        check([gone], "a worker")


def test_of_one_with_another_way_the_log_warns(caplog: pytest.LogCaptureFixture) -> None:
    check([PrivateName("threading", "_gone", "something", "it takes longer")], "a worker")
    assert caplog.messages == [
        "this Python has no threading._gone: it takes longer [mp-rerank explain private-name-missing]"
    ]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("no.such.module", "x"),
        ("threading.NoSuchClass", "x"),
        ("multiprocessing.queues.Queue", "_no_such_attribute"),
        ("multiprocessing.spawn._main", "_no_such_attribute"),
        ("threading", "_gone|_gone_too"),
    ],
)
def test_what_is_not_there_is_missed(owner: str, name: str) -> None:
    assert missing([PrivateName(owner, name, "something")])


WITHOUT = """
import concurrent.futures.process, concurrent.futures.thread, logging, multiprocessing.util, threading
del threading._register_atexit, multiprocessing.util._log_to_stderr
logging.basicConfig()
from mp_rerank import ModelSpec, RerankerPool
pool = RerankerPool(ModelSpec("fake", loader="fakes:load"), devices="cpu", workers=1)
print(len(pool.rerank("query", ["a", "b"])))
"""


def test_a_pool_works_and_ends_without_those_that_can_be_done_without() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == ("2\n", 0)
    assert "this Python has no threading._register_atexit: a program that ends without closing" in done.stderr
