"""The code in the documentation: it compiles, what it imports is there, and whole programs run."""

from __future__ import annotations

import ast
import importlib.util
import os
import socket
import subprocess
import sys
import urllib.request
from contextlib import closing, nullcontext
from pathlib import Path

import pytest
from conftest import PATIENCE, one_cpu, until
from pages import FAKE, PAGES, ROOT, WHOLE, Program, blocks, environment, programs, run

import mp_rerank

# The pages that are about the built-in model itself.
REAL = {"docs/start.md"}
FRAMEWORKS = {"langroid", "langchain_core", "llama_index", "haystack", "fastapi", "celery", "sentence_transformers"}
WHOLE_PAGES = [page for page in PAGES if page.startswith(WHOLE)]
PROGRAMS = [program for page in WHOLE_PAGES for program in programs(page)]

# Langroid counts tokens with an encoding that tiktoken would download.
BEFORE = {
    "docs/howto/agents.md:1": """
import tiktoken
for name in ("cl100k_base", "o200k_base"):
    tiktoken.registry.ENCODINGS[name] = tiktoken.Encoding(
        name, pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}
    )
""",
}
# What a reader does next: a client's call, for programs that only define a service.
THEN = {
    "docs/howto/fastapi.md:1": """
from fastapi.testclient import TestClient
with TestClient(app) as client:
    asked = {"query": "q", "documents": ["a", "b", "c"], "top_n": 2}
    answer = client.post("/rerank", json=asked)
    assert answer.status_code == 200 and len(answer.json()) == 2, answer.text
    app.state.pool = RerankerPool(max_pending_pairs=1, overload="raise").start()
    first = app.state.pool.submit("q", ["!hang"])
    assert client.post("/rerank", json=asked).status_code == 503
    app.state.pool.close(drain=False)
""",
    "docs/howto/celery-and-gunicorn.md:1": """
from celery.contrib.testing.worker import start_worker
with start_worker(app, pool="threads", concurrency=4, perform_ping_check=False):
    asked = [rerank.delay("q", ["a", "b", str(i)], 2) for i in range(8)]
    assert all(len(result.get(timeout=30)) == 2 for result in asked)
""",
}


@pytest.mark.parametrize("page", PAGES)
def test_every_block_compiles_and_imports_what_is_there(page: str) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mp_rerank":
                for alias in node.names:
                    assert alias.name in names_of(node.module or ""), f"{page}: {ast.unparse(node)}"


def names_of(module: str) -> set[str]:
    """The public names of a module of ours, which is not imported: it may need a framework."""
    if module == "mp_rerank":
        return {*mp_rerank.__all__, *(path.stem for path in (ROOT / "mp_rerank").glob("*.py"))}
    path = ROOT.joinpath(*module.split("."))
    if path.is_dir():
        return {inner.stem for inner in path.glob("*.py")}
    tree = ast.parse(path.with_suffix(".py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


@pytest.mark.parametrize(
    "program",
    [pytest.param(p, id=p.name, marks=[pytest.mark.real] if p.name.split(":")[0] in REAL else []) for p in PROGRAMS],
)
def test_a_program_runs_as_it_stands(program: Program, tmp_path: Path) -> None:
    for name in sorted(needed(program.text)):
        must_be_installed(name)
    text = BEFORE.get(program.name, "") + program.text + THEN.get(program.name, "")
    fake = program.name.split(":")[0] not in REAL
    with nullcontext() if fake else one_cpu():
        printed = run(text, tmp_path, fake=fake, seconds=2 * PATIENCE)
    if "print(" in program.text:
        assert printed


def must_be_installed(name: str) -> None:
    """Skip without the framework, except under ``tox -e newest``. It is not imported: that is the program's to do."""
    if importlib.util.find_spec(name) is None:
        assert os.environ.get("MP_RERANK_INTEGRATIONS") != "required", f"{name} is not installed"
        pytest.skip(f"{name} is not installed")


def needed(text: str) -> set[str]:
    """The frameworks that a program imports."""
    return imported(text) & FRAMEWORKS


def imported(text: str) -> set[str]:
    """The packages that a program imports."""
    names: list[str] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {name.partition(".")[0] for name in names}


def test_gunicorn_answers_from_one_pool(tmp_path: Path) -> None:
    must_be_installed("gunicorn")
    (program,) = [p for p in PROGRAMS if p.name == "docs/howto/celery-and-gunicorn.md:2"]
    (tmp_path / "app.py").write_text(FAKE + program.text)
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        address = "127.0.0.1:{1}".format(*free.getsockname())
    command = [sys.executable, "-m", "gunicorn", "app:app", "--workers", "1", "--threads", "8", "--bind", address]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE) as server:
        try:
            until(lambda: answers(address))
            body = b'{"query": "q", "documents": ["a", "b", "c"]}'
            with urllib.request.urlopen(f"http://{address}/", data=body, timeout=PATIENCE) as answer:
                assert answer.read().count(b"relevance_score") == 3
        finally:
            server.terminate()
            server.communicate(timeout=PATIENCE)


def answers(address: str) -> bool:
    host, _, port = address.partition(":")
    with closing(socket.socket()) as client:
        return client.connect_ex((host, int(port))) == 0


def test_every_framework_of_the_pages_is_known() -> None:
    known = FRAMEWORKS | {"mp_rerank", "pydantic"} | sys.stdlib_module_names
    assert {name for program in PROGRAMS for name in imported(program.text)} <= known
