"""The files of a run: queries, corpus, first stage and judgements are read, the output is written and gone on with.

Whatever is wrong in a file is ``ValueError``, naming the file and the line. The formats are those of `bulk`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from mp_rerank._text import one_line

__all__ = [
    "Candidates",
    "Corpus",
    "Output",
    "already_written",
    "columns_of",
    "groups",
    "read_qrels",
    "read_queries",
    "survey",
]


class Candidates(NamedTuple):
    """A query and its documents, by their ids."""

    query: str
    documents: list[str]


# Reading.


# Reading.


def _opened(path: str | Path, mode: str = "rb", buffering: int = -1) -> BinaryIO:
    try:
        return open(path, mode, buffering)  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def columns_of(path: str | Path, count: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and columns of a file with ``count`` columns, separated by white space. Blank lines are skipped."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            columns = _decoded(line, path, number).split()
            if columns:
                if len(columns) != count:
                    raise ValueError(f"{path}, line {number}: {count} columns are needed, not {len(columns)}")
                yield number, columns


def groups(run: str | Path) -> Iterator[Candidates]:
    """The run's queries with their documents, one at a time."""
    query: str | None = None
    documents: list[str] = []
    for _, columns in columns_of(run, 6):
        if columns[0] != query:
            if query is not None:
                yield Candidates(query, documents)
            query, documents = columns[0], []
        documents.append(columns[2])
    if query is not None:
        yield Candidates(query, documents)


def survey(run: str | Path) -> tuple[dict[str, int], set[str]]:
    """How many documents each query of ``run`` has, in its order; and all documents it names."""
    counts: dict[str, int] = {}
    wanted: set[str] = set()
    for candidates in groups(run):
        if candidates.query in counts:
            raise ValueError(f"{run}: the lines of query {one_line(candidates.query)} do not stand together")
        if len(set(candidates.documents)) != len(candidates.documents):
            raise ValueError(f"{run}: query {one_line(candidates.query)} has a document twice")
        counts[candidates.query] = len(candidates.documents)
        wanted.update(candidates.documents)
    if not counts:
        raise ValueError(f"{run}: there is nothing in it")
    return counts, wanted


def read_queries(path: str | Path, counts: dict[str, int], run: str | Path) -> dict[str, str]:
    """The texts of the queries of ``counts``, which are those of ``run``, by their ids."""
    texts = {}
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            entry = _entry(line, path, number)
            if entry is not None and entry[0] in counts:
                texts[entry[0]] = entry[1]
    for query in counts:
        if query not in texts:
            raise ValueError(f"{path}: query {one_line(query)} of {run} is not in it")
    return texts


class Corpus:
    """The documents' texts by id, read from the file when they are asked for."""

    def __init__(self, path: str | Path, wanted: set[str], run: str | Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}  # where the line begins, and its number
        place = 0
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                entry = _entry(line, path, number)
                if entry is not None and entry[0] in wanted:
                    self._places[entry[0]] = (place, number)
                place += len(line)
        if len(self._places) < len(wanted):
            missing = min(wanted - self._places.keys())
            raise ValueError(f"{path}: document {one_line(missing)} of {run} is not in it")
        self._file = _opened(path)

    def __getitem__(self, name: str) -> str:
        place, number = self._places[name]
        self._file.seek(place)
        entry = _entry(self._file.readline(), self._path, number)
        assert entry is not None
        return entry[1]

    def __enter__(self) -> Corpus:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _entry(line: bytes, path: str | Path, number: int) -> tuple[str, str] | None:
    """Id and text of a line of queries or of a corpus; ``None`` for a blank one."""
    text = _decoded(line, path, number).rstrip("\r\n")
    if not text.strip():
        return None
    if os.fspath(path).endswith((".jsonl", ".ndjson")):
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error.msg} (column {error.colno})") from error
        if not isinstance(value, dict) or "_id" not in value or not isinstance(value.get("text"), str):
            raise ValueError(f"{path}, line {number}: an object with '_id' and 'text' is needed")
        return str(value["_id"]), f"{value.get('title') or ''} {value['text']}".strip()
    name, tab, rest = text.partition("\t")
    if not tab:
        raise ValueError(f"{path}, line {number}: an id, a tab and a text are needed")
    return name.strip(), rest.replace("\t", " ").strip()


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """The grades of judged documents, by query and document."""
    qrels: dict[str, dict[str, int]] = {}
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            columns = _decoded(line, path, number).split()
            if not columns or (number == 1 and columns[0] == "query-id"):
                continue
            try:
                query, document, grade = columns if len(columns) == 3 else (columns[0], columns[2], columns[3])
                qrels.setdefault(query, {})[document] = int(grade)
            except (IndexError, ValueError):
                raise ValueError(f"{path}, line {number}: neither a TREC nor a BEIR judgement") from None
    return qrels


def _decoded(line: bytes, path: str | Path, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8: {error.reason}") from error


# Writing, and what is there already.


# Writing, and what is there already.


class Output:
    """The run that is written: a query at a time, at once.

    Args:
        path: the file.
        keep_bytes: how much of it to keep.
        top_n, tag: as for ``rerank_run``.
    """

    def __init__(self, path: str | Path, keep_bytes: int, top_n: int | None, tag: str) -> None:
        self._path = path
        self._top_n = top_n
        self._tag = tag
        self._file = _opened(path, "ab", buffering=0)  # so that no text is left to write when the disk is full
        self._file.truncate(keep_bytes)

    def write(self, candidates: Candidates, scores: Sequence[float | None]) -> None:
        """Write a query's documents, best first; last those without a score, in the order they came."""
        found = [(score, i) for i, score in enumerate(scores) if score is not None]
        ranked = sorted(found, key=lambda pair: (-pair[0], pair[1]))
        lowest = ranked[-1][0] if ranked else 0.0
        step = max(1.0, abs(lowest) / 1000)
        failed = [i for i, score in enumerate(scores) if score is None]
        ranked += [(lowest - step * n, i) for n, i in enumerate(failed, 1)]
        query, names = candidates
        rest = memoryview(
            "".join(
                f"{query} Q0 {names[i]} {rank} {score:.9g} {self._tag}\n"
                for rank, (score, i) in enumerate(ranked[: self._top_n], 1)
            ).encode()
        )
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(self._path)) from error

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def already_written(
    output: str | Path, counts: dict[str, int], top_n: int | None, tag: str, overwrite: bool
) -> tuple[int, int]:
    """How many whole queries ``output`` begins with, and in how many bytes."""
    if not os.path.exists(output):
        return 0, 0
    if not os.path.isfile(output):  # a device or a pipe could not be gone on with
        raise ValueError(f"{output}: it is not a regular file")
    if overwrite:
        return 0, 0
    expected = iter(counts.items())
    found = kept = end = lines = 0
    query = None
    due = 0
    with _opened(output) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break  # half a line
            columns = line.decode("utf-8", "replace").split()
            if len(columns) != 6:
                raise ValueError(f"{output}, line {number}: not a line of a run; move it away, or overwrite it")
            if columns[5] != tag:
                raise ValueError(f"{output}, line {number}: it is tagged {columns[5]!r}, and this would be {tag!r}")
            if columns[0] != query:
                if lines != due:
                    raise ValueError(
                        f"{output}, line {number}: query {one_line(query)} has {lines} lines, and {due} are due"
                    )
                query, count = next(expected, (None, 0))
                if query != columns[0]:
                    raise ValueError(
                        f"{output}, line {number}: query {columns[0]!r} is not the run's next: it is of another run"
                    )
                lines, due = 0, count if top_n is None else min(count, top_n)
            lines += 1
            end += len(line)
            if lines == due:
                found, kept = found + 1, end
            elif lines > due:
                raise ValueError(f"{output}, line {number}: query {one_line(query)} has more than {due} lines")
    return found, kept
