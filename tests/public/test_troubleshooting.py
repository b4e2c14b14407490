"""Every error, and every warning or error that is logged, has an entry in the page, which the command finds."""

from __future__ import annotations

import ast
import pickle
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mp_rerank import errors
from mp_rerank._wire import error_as_json
from mp_rerank.cli import main
from mp_rerank.cli.explain import entries, explain

PACKAGE = Path(errors.__file__).parent
HEADINGS = [entry.heading for entry in entries()]
PLACEHOLDER = re.compile(r"%[^a-z%]*[a-z]")


def logged() -> Iterator[tuple[str, str]]:
    """Where the package logs a warning or an error, and with which words."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr not in ("warning", "error", "exception", "critical"):
                continue
            if not (isinstance(node.func.value, ast.Name | ast.Attribute) and "log" in ast.unparse(node.func.value)):
                continue
            words = ast.literal_eval(node.args[0])  # a constant: a message is not put together beforehand
            if words != "%s":  # an error's own text: the error has an entry
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", words


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_has_an_entry(name: str) -> None:
    assert name in HEADINGS, f"add an entry to troubleshooting.md: ### {name}"
    assert [entry.heading for entry in explain(name)] == [name]


@pytest.mark.parametrize(("where", "words"), [pytest.param(*found, id=found[0]) for found in logged()])
def test_what_is_logged_has_an_entry(where: str, words: str) -> None:
    message = PLACEHOLDER.sub("…", words)
    assert any(says(heading, message) for heading in HEADINGS), f"troubleshooting.md: {where} needs ### {message}"


def says(heading: str, message: str) -> bool:
    """Whether ``heading`` is ``message``, or its beginning; of what varies twice in a row, one case."""
    if "… …" not in message:
        return heading == message or (heading.endswith(": …") and message.startswith(heading[:-1]))
    return re.fullmatch(".+".join(map(re.escape, message.split("…"))), heading) is not None


def test_headings_differ() -> None:
    assert len(set(HEADINGS)) == len(HEADINGS)


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("mp_rerank.errors.WorkerCrashedError: document 3 ended 3 workers", "WorkerCrashedError"),
        ("WARNING:mp_rerank.pool:worker 0 on cpu died with exit code -9 (SIGKILL)", "worker … on … died with …"),
        ("worker 1 on cuda:0 is given up: 6 workers in a row ended", "worker … on … is given up: …"),
        ("worker 1: builtin could not be loaded on cpu: OSError()", "worker …: …"),
        ("models take 9.1 GiB of memory, and 8.0 GiB is their bound", "models take … of memory, and … is their bound"),
        ("NotImplementedError: Cannot copy out of meta tensor; no data!", "Cannot copy out of meta tensor; no data!"),
        ("slower", "It is slower than expected"),
    ],
)
def test_a_line_of_the_log_leads_to_its_entry(line: str, heading: str) -> None:
    assert [entry.heading for entry in explain(line)] == [heading]


def test_the_command_prints_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "ScoringError"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ScoringError\n\nThe model raised an exception on a document")
    assert "](" not in printed


def test_the_command_lists_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert capsys.readouterr().out.splitlines() == HEADINGS
    assert main(["explain", "how", "do", "birds", "fly"]) == 2
    assert "nothing is known of 'how do birds fly'" in capsys.readouterr().err


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions have notes since Python 3.11")
def test_an_error_s_traceback_says_where_to_look() -> None:
    error = errors.ModelLoadError("it could not be loaded", model="m")
    for one in (error, pickle.loads(pickle.dumps(error))):
        assert one.__notes__ == ["What it means and what to do: mp-rerank explain ModelLoadError"]
        assert str(one) == "it could not be loaded"


def test_the_note_is_no_fact_to_be_sent_to_clients() -> None:
    assert set(error_as_json(errors.ModelLoadError("text", model="m"))["facts"]) == {"model", "device", "cause"}
