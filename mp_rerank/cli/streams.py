"""Standard input and output. Where one is closed, full or a broken pipe, the user gets one line and an exit code."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

__all__ = [
    "InputError",
    "OutputError",
    "check_output",
    "discard_output",
    "flush",
    "input_lines",
    "prepare",
    "write",
    "write_json",
]

# What json leaves as it is, and a terminal obeys or a stream cannot encode.
NOT_IN_JSON = re.compile(r"[\x7f-\x9f\ud800-\udfff]")


class InputError(Exception):
    """The input is not what it should be; the message is for the user."""


class OutputError(Exception):
    """The result cannot be written; the message is for the user."""


def prepare() -> None:
    """Make the standard streams usable for this process and its workers.

    While descriptor 0, 1 or 2 is closed, the next file that is opened gets its number. It is then taken for the stream,
    and overwritten: a worker would lose a pipe to its parent.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
            os.set_inheritable(descriptor, True)  # or it would be closed again in every worker
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # for as long as the process lives
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than documents have


def input_lines() -> Iterator[bytes]:
    """The lines of standard input."""
    if sys.stdin is None:
        raise InputError("standard input is closed: name a FILE")
    try:
        yield from sys.stdin.buffer
    except OSError as error:
        raise InputError(f"standard input: {error.strerror}") from error


def check_output() -> None:
    """Raise ``OutputError`` if nothing can be written: before the work, and not after it."""
    if sys.stdout is None:
        raise OutputError("standard output is closed")


def write(text: str) -> None:
    """Print ``text`` and a newline."""
    check_output()
    try:
        print(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output: {error.strerror}") from error


def write_json(value: Any) -> None:
    """Print ``value`` as JSON: ``null`` for a number that JSON does not have, and nothing that commands a terminal."""
    text = json.dumps(_with_null(value), ensure_ascii=False, indent=2, allow_nan=False)
    write(NOT_IN_JSON.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def flush() -> None:
    """Write out what ``write`` has left in a buffer."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"standard output: {error.strerror}") from error


def discard_output() -> None:
    """Send what is left in the buffer to nowhere. Otherwise the interpreter fails to write it when it exits."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_null(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _with_null(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_null(inner) for inner in value]
    return value
