"""Every error, and every warning or error that is logged, names its entry in the page, which the command finds."""

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
ENTRIES = {entry.name: entry for entry in entries()}
PLACEHOLDER = re.compile(r"%[^a-z%]*[a-z]")
LINKED = re.compile(r"(.+) \[mp-rerank explain ([\w-]+)\]")
# Said at the level of a warning so that it is seen: nothing is wrong, and there is nothing to look up.
NO_FAULT = "no-fault"


def logged() -> Iterator[tuple[str, str]]:
    """Where the package logs a warning or an error, and with which words."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            if node.func.attr in ("warning", "error", "exception", "critical") and "log" in ast.unparse(
                node.func.value
            ):
                words = ast.literal_eval(node.args[0])  # a constant: a message is not put together beforehand
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", PLACEHOLDER.sub("…", words)


LOGGED = dict(logged())


@pytest.mark.parametrize("name", errors.__all__)
def test_an_error_has_an_entry(name: str) -> None:
    assert name in ENTRIES, f"add an entry to troubleshooting.md: ### {name}"
    assert [entry.name for entry in explain(name)] == [name]


@pytest.mark.parametrize("where", LOGGED)
def test_what_is_logged_names_its_entry(where: str) -> None:
    message = LOGGED[where]
    if message in ENTRIES[NO_FAULT].messages:
        return
    linked = LINKED.fullmatch(message)
    assert linked is not None, f"{where} ends with [mp-rerank explain NAME], for an entry of troubleshooting.md"
    message, name = linked.groups()
    assert name in ENTRIES, f"add an entry to troubleshooting.md: ### {name}"
    own_text = message == "…"  # an error's: the error has an entry
    assert own_text or any(says(said, message) for said in ENTRIES[name].messages), f"{name} needs - `{message}`"


def says(said: str, message: str) -> bool:
    """Whether an entry's line is ``message``, or its beginning."""
    return said == message or (said.endswith(": …") and message.startswith(said[:-1]))


def test_no_entry_is_of_a_message_that_is_gone() -> None:
    messages = [message for logged in LOGGED.values() for message in LINKED.sub(r"\1", logged).splitlines()]
    for entry in ENTRIES.values():
        for said in entry.messages:
            assert any(says(said, message) for message in messages), f"{entry.name}: nothing logs {said!r}"


def test_names_differ() -> None:
    assert len(ENTRIES) == len(entries())


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("mp_rerank.errors.WorkerCrashedError: document 3 ended 3 workers", "WorkerCrashedError"),
        ("WARNING:mp_rerank.pool:worker 0 on cpu died with SIGKILL (exit code -9)", "worker-died"),
        ("worker 1 on cuda:0 is given up: 6 workers in a row ended", "worker-given-up"),
        ("worker 1: builtin could not be loaded on cpu: OSError()", "worker-not-loaded"),
        ("worker 1: worker 2 died with no text [mp-rerank explain worker-not-loaded]", "worker-not-loaded"),
        ("models take 9.1 GiB of memory, and 8.0 GiB is their bound", "models-above-bound"),
        ("worker-died", "worker-died"),
        ("NotImplementedError: Cannot copy out of meta tensor; no data!", "Cannot copy out of meta tensor; no data!"),
        ("slower", "It is slower than expected"),
    ],
)
def test_a_line_of_the_log_leads_to_its_entry(line: str, name: str) -> None:
    assert [entry.name for entry in explain(line)] == [name]


def test_the_command_prints_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "ScoringError"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("ScoringError\n\nThe model raised an exception on a document")
    assert "](" not in printed
    assert main(["explain", "worker-died"]) == 0
    assert capsys.readouterr().out.startswith("worker-died\n    worker … on … died with …\n\nThe process ended")


def test_the_command_lists_what_it_knows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")] == list(ENTRIES)
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
