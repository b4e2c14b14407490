"""Documents from a file or from standard input: lines of text, or JSONL."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mp_rerank.cli.streams import InputError, input_lines

__all__ = ["Document", "read_documents"]

JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        text: what is scored.
        record: the JSON object it was in; ``None``: it was not in one.
    """

    text: str
    record: Any = None


def read_documents(name: str, form: str | None = None, field: str = "text") -> list[Document]:
    """The documents of a file, or of standard input if ``name`` is ``-``.

    Args:
        name: the file.
        form: ``"lines"`` or ``"jsonl"``; ``None``: by the file's name.
        field: where a JSON object has its text.

    Raises:
        InputError: it cannot be read, or holds no document.
    """
    lines: Iterable[bytes]
    if name == "-":
        lines = input_lines()
    else:
        try:
            lines = Path(name).read_bytes().splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{name}: {getattr(error, 'strerror', error)}") from error
    form = form or ("jsonl" if name.endswith(JSONL_SUFFIXES) else "lines")
    where = "standard input" if name == "-" else name
    documents = list(_parsed(lines, where, form, field))
    if not documents:
        raise InputError(f"{where}: there are no documents in it")
    return documents


def _parsed(lines: Iterable[bytes], where: str, form: str, field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise InputError(f"{where}, line {number}: not UTF-8: {error.reason}") from error
        if not text:
            continue
        if form == "lines":
            yield Document(text)
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{where}, line {number}: not JSON: {error.msg} (column {error.colno})") from error
        except RecursionError as error:
            raise InputError(f"{where}, line {number}: JSON that is nested too deep") from error
        if isinstance(value, str):
            yield Document(value)
        elif isinstance(value, dict) and isinstance(value.get(field), str):
            yield Document(value[field], value)
        else:
            raise InputError(f"{where}, line {number}: neither a string nor an object with a string as {field!r}")
