"""Rerank a whole run: queries, a corpus and a first stage's candidates in, a run in TREC's format out.

    rerank_run(pool, queries="queries.jsonl", corpus="corpus.jsonl", run="bm25.run", output="out.run")

Formats:
    queries     BEIR's JSONL (``_id``, ``text``), or lines of id, tab, text
    corpus      BEIR's JSONL (``_id``, ``title``, ``text``), or lines of id, tab, text; a title goes before the text
    run         TREC's: query id, ``Q0``, document id, rank, score, tag; the lines of a query stand together
    qrels       TREC's (query id, ``0``, document id, grade), or BEIR's TSV with its header

The corpus stays on disk: where each document of the run begins is kept in memory, and the texts of a few queries at
a time. Queries are written in the run's order, each as soon as it and all before it are scored. So the output is a
beginning of the work, and running again goes on after it; the last query is scored again if it is not whole. The tag
says which model wrote the output, and another one's is not continued.

Mistakes in files are ``ValueError``, naming file and line, before anything is scored.
"""

from __future__ import annotations

import json
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult

__all__ = ["BulkSummary", "evaluate", "rerank_run"]

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100")

# Enough to keep a worker busy while the next texts are read. Not more: queries in flight take turns, so that the more
# there are, the later each of them can be written.
PAIRS_IN_FLIGHT_CPU = 128
PAIRS_IN_FLIGHT_GPU = 2048


@dataclass(frozen=True)
class BulkSummary:
    """What a call of ``rerank_run`` did.

    Attributes:
        queries, pairs: scored by this call.
        found_queries: already in the output, and left as they were.
        seconds: from the first request to the last line written; workers had started before.
        pairs_per_second: ``pairs`` by ``seconds``; 0 where there was nothing to do.
    """

    queries: int
    pairs: int
    found_queries: int
    seconds: float
    pairs_per_second: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs_per_second", self.pairs / self.seconds if self.pairs else 0.0)

    def __str__(self) -> str:
        there = f"; {self.found_queries:,} were there already" if self.found_queries else ""
        return (
            f"{self.queries:,} queries, {self.pairs:,} pairs in {self.seconds:.1f} s "
            f"({self.pairs_per_second:,.0f} a second){there}"
        )


class _Candidates(NamedTuple):
    query: str
    documents: list[str]


def rerank_run(
    pool: RerankerPool,
    *,
    queries: str | Path,
    corpus: str | Path,
    run: str | Path,
    output: str | Path,
    top_n: int | None = None,
    tag: str = "mp_rerank",
    overwrite: bool = False,
    progress: bool | None = False,
) -> BulkSummary:
    """Rerank each query's candidates and write them to ``output``, going on where an earlier call was ended.

    Args:
        pool: what scores. It is started here, once the files are known to be good.
        queries, corpus, run: the files to read.
        output: the file to write; what is in it already is kept, and must be a beginning of the same work.
        top_n: how many documents of a query to write; ``None``: all.
        tag: the last column; one word.
        overwrite: begin again, whatever is in the output.
        progress: show a bar on standard error; ``None``: if that is a terminal.

    Raises:
        ValueError: a file is not as it should be.
        RerankError: scoring failed; what is written so far is good, and the next call goes on from there.
    """
    from tqdm import tqdm

    if top_n is not None and top_n < 1:
        raise ValueError(f"top_n: at least 1 is needed, not {top_n}")
    if not tag or tag.split() != [tag]:
        raise ValueError(f"tag: one word is needed, not {tag!r}")
    counts, wanted = _survey(run)
    texts = _read_queries(queries, counts, run)
    found, keep_bytes = (0, 0) if overwrite else _already(output, counts, top_n, tag)
    pending: deque[tuple[_Candidates, Future[list[RerankResult]]]] = deque()
    scored = in_flight = 0
    with _Corpus(corpus, wanted, run) as documents, _opened(output, "ab") as out:
        out.truncate(keep_bytes)
        total = sum(list(counts.values())[found:])
        if total:
            pool.start()
        bound = sum(PAIRS_IN_FLIGHT_CPU if worker.device == "cpu" else PAIRS_IN_FLIGHT_GPU for worker in pool.workers())
        start = time.perf_counter()
        with tqdm(total=total, unit="pair", disable=None if progress is None else not progress) as bar:

            def finish() -> int:
                candidates, future = pending.popleft()
                query, names = candidates
                ranked = enumerate(future.result(), 1)
                lines = [f"{query} Q0 {names[r.index]} {rank} {r.relevance_score:.9g} {tag}\n" for rank, r in ranked]
                out.write("".join(lines).encode())
                out.flush()
                bar.update(len(candidates.documents))
                return len(candidates.documents)

            try:
                for number, candidates in enumerate(_groups(run)):
                    if number < found:
                        continue
                    while len(pending) > 1 and in_flight + len(candidates.documents) > bound:
                        in_flight -= finish()
                    future = pool.submit(
                        texts[candidates.query], [documents[name] for name in candidates.documents], top_n=top_n
                    )
                    pending.append((candidates, future))
                    in_flight += len(candidates.documents)
                    scored += 1
                    while pending and pending[0][1].done():
                        in_flight -= finish()
                while pending:
                    in_flight -= finish()
            finally:
                for _, future in pending:
                    future.cancel()
        return BulkSummary(scored, total, found, time.perf_counter() - start)


def evaluate(
    qrels: str | Path, runs: Sequence[str | Path], measures: Sequence[str] = DEFAULT_MEASURES
) -> list[dict[str, float]]:
    """Means of ``measures`` (as ir-measures writes them, such as ``nDCG@10``) for each run, over the judged queries.

    Raises:
        ModuleNotFoundError: ir-measures is not installed; it is in the extra ``metrics``.
        ValueError: a measure is unknown, or a file is not as it should be.
    """
    parsed = parse_measures(measures)
    judged = _read_qrels(qrels)
    import ir_measures

    results = []
    for run in runs:
        scores: dict[str, dict[str, float]] = {}
        for number, columns in _columns(run, 6):
            try:
                scores.setdefault(columns[0], {})[columns[2]] = float(columns[4])
            except ValueError:
                raise ValueError(f"{run}, line {number}: the score {columns[4]!r} is not a number") from None
        means = ir_measures.calc_aggregate(parsed, judged, scores)
        results.append({str(measure): float(means[measure]) for measure in parsed})
    return results


def parse_measures(measures: Sequence[str]) -> list[Any]:
    """``measures`` as ir-measures' own objects; raises as ``evaluate`` does."""
    try:
        import ir_measures
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("measures need ir-measures: pip install 'mp-rerank[metrics]'") from error
    parsed = []
    for name in measures:
        try:
            parsed.append(ir_measures.parse_measure(name))
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(f"measures: {name!r} is not known to ir-measures ({error})") from None
    return parsed


def model_tag(spec: ModelSpec) -> str:
    """A run's tag that tells which model made it, and how far it read: one word.

    Of a folder's path its name and a checksum: many are called ``model``.
    """
    backend = None if spec.backend == "torch" else spec.backend
    folder = Path(spec.name).resolve()
    where = f"{zlib.crc32(str(folder).encode()):08x}" if spec.name != BUILTIN and folder.is_dir() else None
    parts = [spec.name.rstrip("/").rpartition("/")[2], where, spec.revision, backend, spec.dtype, spec.max_length]
    return ":".join(["mp_rerank", *(re.sub(r"[^A-Za-z0-9._-]+", "-", str(part)) for part in parts if part is not None)])


# What is there already.


def _already(output: str | Path, counts: dict[str, int], top_n: int | None, tag: str) -> tuple[int, int]:
    """How many whole queries ``output`` begins with, and in how many bytes."""
    if not Path(output).exists():
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
                    raise ValueError(f"{output}, line {number}: query {query} has {lines} lines, and {due} are due")
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
                raise ValueError(f"{output}, line {number}: query {query} has more than {due} lines")
    return found, kept


# Reading.


def _opened(path: str | Path, mode: str = "rb") -> BinaryIO:
    try:
        return open(path, mode)  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _columns(path: str | Path, count: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and columns of a file of so many columns between white space; blank lines are skipped."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            columns = _decoded(line, path, number).split()
            if columns:
                if len(columns) != count:
                    raise ValueError(f"{path}, line {number}: {count} columns are needed, not {len(columns)}")
                yield number, columns


def _groups(run: str | Path) -> Iterator[_Candidates]:
    """The run's queries with their documents, one at a time."""
    query: str | None = None
    documents: list[str] = []
    for _, columns in _columns(run, 6):
        if columns[0] != query:
            if query is not None:
                yield _Candidates(query, documents)
            query, documents = columns[0], []
        documents.append(columns[2])
    if query is not None:
        yield _Candidates(query, documents)


def _survey(run: str | Path) -> tuple[dict[str, int], set[str]]:
    """How many documents each query of ``run`` has, in its order; and all documents it names."""
    counts: dict[str, int] = {}
    wanted: set[str] = set()
    for candidates in _groups(run):
        if candidates.query in counts:
            raise ValueError(f"{run}: the lines of query {candidates.query} do not stand together")
        if len(set(candidates.documents)) != len(candidates.documents):
            raise ValueError(f"{run}: query {candidates.query} has a document twice")
        counts[candidates.query] = len(candidates.documents)
        wanted.update(candidates.documents)
    if not counts:
        raise ValueError(f"{run}: there is nothing in it")
    return counts, wanted


def _read_queries(path: str | Path, counts: dict[str, int], run: str | Path) -> dict[str, str]:
    texts = {}
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            entry = _entry(line, path, number)
            if entry is not None and entry[0] in counts:
                texts[entry[0]] = entry[1]
    for query in counts:
        if query not in texts:
            raise ValueError(f"{path}: query {query} of {run} is not in it")
    return texts


class _Corpus:
    """Texts by id, read when they are asked for."""

    def __init__(self, path: str | Path, wanted: set[str], run: str | Path) -> None:
        self._path = path
        self._places: dict[str, tuple[int, int]] = {}  # where its line begins, and the line's number
        place = 0
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                entry = _entry(line, path, number)
                if entry is not None and entry[0] in wanted:
                    self._places[entry[0]] = (place, number)
                place += len(line)
        if len(self._places) < len(wanted):
            missing = min(wanted - self._places.keys())
            raise ValueError(f"{path}: document {missing} of {run} is not in it")
        self._file = _opened(path)

    def __getitem__(self, name: str) -> str:
        place, number = self._places[name]
        self._file.seek(place)
        entry = _entry(self._file.readline(), self._path, number)
        assert entry is not None
        return entry[1]

    def __enter__(self) -> _Corpus:
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


def _read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
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
