"""Rerank a whole run: queries, a corpus and a first stage's candidates in, a run in TREC's format out.

    rerank_run(pool, queries="queries.jsonl", corpus="corpus.jsonl", run="bm25.run", output="out.run")

Formats:
    queries     BEIR's JSONL (``_id``, ``text``), or lines of id, tab, text
    corpus      BEIR's JSONL (``_id``, ``title``, ``text``), or lines of id, tab, text; a title goes before the text
    run         TREC's: query id, ``Q0``, document id, rank, score, tag; the lines of a query stand together
    qrels       TREC's (query id, ``0``, document id, grade), or BEIR's TSV with its header

**Memory.** The corpus stays on disk. In memory are the places in its file where the run's documents begin, and the
texts of a few queries at a time.

**Going on.** Queries are written in the run's order, each once it and all before it are scored. So the output is always
a beginning of the whole, and a second call goes on after it. A query that is not there in full is scored again. The tag
names the model, and the output of another model is not continued.

**Mistakes** in files are ``ValueError``, naming file and line, before anything is scored.

**Documents that cannot be scored** (the model raises an exception on them, they end workers, or their score is not a
number) do not end the work. Each is logged with the ids of query and document, and listed in the summary. In the output
it stands after the query's other documents, with lower scores than theirs: every query keeps all its candidates. A
document that has ended workers is not tried with further queries. If three queries in a row have no score at all, the
model is taken to be at fault, and the last error is raised.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank._checks import check_flag, check_optional_count, check_text
from mp_rerank._text import one_line
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.errors import RerankError, ScoringError, TextTooLongError, WorkerCrashedError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["BulkSummary", "FailedPair", "evaluate", "rerank_run"]

logger = logging.getLogger(__name__)

# How often the log is told how far the work is.
TELL_SECONDS = 60.0

DEFAULT_MEASURES = ("nDCG@10", "RR@10", "R@100")

# Pairs in flight for each worker: enough to keep it busy while the next texts are read, and not more. Queries in flight
# take turns, so with more of them each is written later.
PAIRS_IN_FLIGHT_CPU = 128
PAIRS_IN_FLIGHT_GPU = 2048
# After so many queries in a row without any score the model is at fault, and not the documents.
QUERIES_IN_VAIN = 3


@dataclass(frozen=True)
class FailedPair:
    """A document that could not be scored with a query.

    Attributes:
        query, document: their ids.
        cause: why, in one line.
    """

    query: str
    document: str
    cause: str


@dataclass(frozen=True)
class BulkSummary:
    """What a call of ``rerank_run`` did.

    Attributes:
        queries: queries written by this call.
        pairs: pairs scored by this call.
        found_queries: queries that were in the output already, and were left as they were.
        seconds: from the first request to the last line written; workers had started before.
        failures: the pairs that could not be scored.
        pairs_per_second: ``pairs`` divided by ``seconds``; 0 if nothing was scored.
    """

    queries: int
    pairs: int
    found_queries: int
    seconds: float
    failures: tuple[FailedPair, ...] = ()
    pairs_per_second: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs_per_second", self.pairs / self.seconds if self.pairs else 0.0)

    def __str__(self) -> str:
        there = f"; {self.found_queries:,} were there already" if self.found_queries else ""
        queries = len({failure.query for failure in self.failures})
        failed = f"; {len(self.failures):,} pairs of {queries:,} queries could not be scored" if self.failures else ""
        return (
            f"{self.queries:,} queries, {self.pairs:,} pairs in {self.seconds:.1f} s "
            f"({self.pairs_per_second:,.0f} a second){there}{failed}"
        )


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
    **options: Unpack[RequestKeywords],
) -> BulkSummary:
    """Rerank each query's candidates and write them to ``output``, going on where an earlier call was ended.

    Args:
        pool: what scores. It is started here, once the files are known to be good.
        queries, corpus, run: the files to read.
        output: the file to write. What is in it already is kept, and must be a beginning of the same work.
        top_n: how many documents of a query to write; ``None``: all.
        tag: the last column; one word.
        overwrite: begin again, whatever is in the output.
        progress: show a bar on standard error; ``None``: if that is a terminal. The log has a line a minute at INFO.
        options: those of ``pool.submit`` that say how texts are read, such as ``instruction`` and ``long_documents``.
            To go on with a run, give those it was begun with.

    Raises:
        TypeError, ValueError: an argument or a file is not as it should be.
        RerankError: scoring failed as a whole. What is written so far is good, and the next call goes on from there.
        OSError: the output could not be written, such as on a full disk; the same holds.
    """
    from tqdm import tqdm

    _check_options(top_n, tag, overwrite, progress, options)
    counts, wanted = _survey(run)
    texts = _read_queries(queries, counts, run)
    found, keep_bytes = _already(output, counts, top_n, tag, overwrite)
    left = sum(list(counts.values())[found:])
    with _Corpus(corpus, wanted, run) as documents, _Output(output, keep_bytes, top_n, tag) as out:
        if left:
            pool.start()
        start = time.perf_counter()
        if found:
            logger.info("%s: %d of %d queries are there already", one_line(output), found, len(counts))
        with (
            tqdm(total=left, unit="pair", disable=None if progress is None else not progress) as bar,
            _InFlight(pool, out.write, _Told(output, left, bar.update).advance, options) as in_flight,
        ):
            for candidates in islice(_groups(run), found, None):
                query = texts[candidates.query]
                in_flight.submit(_Task(candidates, query, [documents[name] for name in candidates.documents]))
        failures = tuple(in_flight.failures)
        return BulkSummary(len(counts) - found, left - len(failures), found, time.perf_counter() - start, failures)


def _check_options(
    top_n: int | None, tag: str, overwrite: bool, progress: bool | None, options: RequestKeywords
) -> None:
    for name in ("timeout", "on_timeout", "min_score"):
        if name in options:
            raise TypeError(f"{name}: a run is scored whole")
    RequestOptions.of(options)
    check_optional_count("top_n", top_n)
    check_text("tag", tag)
    if tag.split() != [tag]:
        raise ValueError(f"tag: one word is needed, not {tag!r}")
    check_flag("overwrite", overwrite)
    if progress is not None:
        check_flag("progress", progress)


def evaluate(
    qrels: str | Path, runs: Sequence[str | Path], measures: Sequence[str] = DEFAULT_MEASURES
) -> list[dict[str, float]]:
    """For each run the means of ``measures`` over the judged queries.

    Measures are named as in ir-measures, such as ``nDCG@10``.

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
    """A run's tag that says which model made it, and to which length it read: one word.

    Of a folder's path it has the name and a checksum of the whole, since many folders are called ``model``.
    """
    backend = None if spec.backend == "torch" else spec.backend
    where = None
    if spec.name != BUILTIN and os.path.isdir(spec.path):
        where = f"{zlib.crc32(os.path.realpath(spec.path).encode(errors='surrogateescape')):08x}"
    parts = [spec.name.rstrip("/").rpartition("/")[2], where, spec.revision, backend, spec.dtype, spec.max_length]
    return ":".join(["mp_rerank", *(re.sub(r"[^A-Za-z0-9._-]+", "-", str(part)) for part in parts if part is not None)])


# Scoring.


class _Candidates(NamedTuple):
    """A query and its documents, by their ids."""

    query: str
    documents: list[str]


@dataclass
class _Task:
    """A query in flight.

    Attributes:
        candidates: the ids.
        query, documents: the texts.
        sent: which of the documents were sent to the pool, by their places.
        future: their ranking.
    """

    candidates: _Candidates
    query: str
    documents: list[str]
    sent: list[int] = field(default_factory=list)
    future: Future[list[RerankResult]] = field(default_factory=Future)


class _Told:
    """What the log is told of the work's progress, for whoever has no terminal to look at.

    Args:
        output: the file that is written.
        total: how many pairs there are to score.
        show: what else is to hear of pairs that are done.
    """

    def __init__(self, output: str | Path, total: int, show: Callable[[int], object]) -> None:
        self._output = one_line(output)
        self._total = total
        self._show = show
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, pairs: int) -> None:
        self._show(pairs)
        self._done += pairs
        now = time.monotonic()
        if now - self._last < TELL_SECONDS:
            return
        self._last = now
        rate = self._done / (now - self._start)
        logger.info(
            "%s: %d of %d pairs, %.0f a second, %s left",
            *(self._output, self._done, self._total, rate, timedelta(seconds=round((self._total - self._done) / rate))),
        )


class _InFlight:
    """The queries that are being scored, in the run's order.

    Args:
        pool: what scores; it has started.
        write: called with a query's ids and its scores (``None`` for a document that has none), in the run's order.
        advance: called with the number of documents that are done.
        options: of each request.

    Attributes:
        failures: the pairs that could not be scored, so far.
    """

    def __init__(
        self,
        pool: RerankerPool,
        write: Callable[[_Candidates, Sequence[float | None]], None],
        advance: Callable[[int], object],
        options: RequestKeywords,
    ) -> None:
        self.failures: list[FailedPair] = []
        self._pool = pool
        self._write = write
        self._advance = advance
        self._options = options
        self._tasks: deque[_Task] = deque()
        self._pairs = 0
        self._deadly: dict[str, str] = {}  # documents that have ended workers, and how
        self._in_vain = 0  # queries in a row without any score

    def submit(self, task: _Task) -> None:
        """Have ``task`` scored. Waits while there is enough in flight, and writes what is done."""
        while len(self._tasks) > 1 and self._pairs + len(task.documents) > self._bound():
            self._finish_first()
        task.sent = [i for i, name in enumerate(task.candidates.documents) if name not in self._deadly]
        texts = [task.documents[i] for i in task.sent]
        task.future = self._pool.submit(task.query, texts, top_n=None, **self._options)
        self._tasks.append(task)
        self._pairs += len(task.documents)
        while self._tasks and self._tasks[0].future.done():
            self._finish_first()

    def _bound(self) -> int:
        """Pairs in flight for the workers that there are now: those of a cluster come and go."""
        on_cpu = [worker.device.startswith("cpu") for worker in self._pool.workers()]
        return sum(PAIRS_IN_FLIGHT_CPU if cpu else PAIRS_IN_FLIGHT_GPU for cpu in on_cpu)

    def __enter__(self) -> _InFlight:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            while kind is None and self._tasks:
                self._finish_first()
        finally:
            for task in self._tasks:
                task.future.cancel()

    def _finish_first(self) -> None:
        task = self._tasks.popleft()
        query, documents = task.candidates
        scores, causes = self._scores(task)
        self._check_model(task, scores, causes)
        for i, cause in sorted(causes.items()):
            failure = FailedPair(query, documents[i], one_line(cause))
            self.failures.append(failure)
            logger.warning(
                "query %s, document %s: not scored: %s [mp-rerank explain pair-not-scored]",
                *map(one_line, (query, documents[i], cause)),
            )
        self._write(task.candidates, scores)
        self._pairs -= len(documents)
        self._advance(len(documents))

    def _scores(self, task: _Task) -> tuple[list[float | None], dict[int, str]]:
        """The score of each document of ``task``; and for those without one, by their places, why."""
        names = task.candidates.documents
        scores: list[float | None] = [None] * len(names)
        causes = {i: self._deadly[names[i]] for i in set(range(len(names))).difference(task.sent)}
        try:
            for result in task.future.result():
                scores[task.sent[result.index]] = result.relevance_score
        except (ScoringError, TextTooLongError, WorkerCrashedError) as error:
            _raise_if_no_document_is_to_blame(error)
            self._score_apart(task, scores, causes)
        for i, score in enumerate(scores):
            if score is None:  # in a pool where such a document ranks last
                causes.setdefault(i, "its score is no finite number")
        return scores, causes

    def _score_apart(self, task: _Task, scores: list[float | None], causes: dict[int, str]) -> None:
        """Score each document of ``task`` by itself, since one of them has failed them all."""
        names = task.candidates.documents
        causes |= {i: self._deadly[names[i]] for i in task.sent if names[i] in self._deadly}
        apart = [i for i in task.sent if i not in causes]
        futures = [(i, self._pool.submit(task.query, [task.documents[i]], top_n=None, **self._options)) for i in apart]
        try:
            for i, future in futures:
                try:
                    scores[i] = future.result()[0].relevance_score
                except ScoringError as error:
                    causes[i] = error.cause or str(error)
                except TextTooLongError as error:
                    causes[i] = f"it has {error.tokens} tokens, where {error.limit} are allowed"
                except WorkerCrashedError as error:
                    _raise_if_no_document_is_to_blame(error)
                    causes[i] = f"it ended {error.attempts} workers"
                    self._deadly[names[i]] = f"not tried: {causes[i]} with query {task.candidates.query}"
        finally:
            for _, future in futures:
                future.cancel()

    def _check_model(self, task: _Task, scores: Sequence[float | None], causes: dict[int, str]) -> None:
        """Raise ``ScoringError`` if nothing can be scored any more."""
        if not task.sent:
            return
        self._in_vain = 0 if any(score is not None for score in scores) else self._in_vain + 1
        if self._in_vain == QUERIES_IN_VAIN:
            cause = causes[task.sent[-1]]
            raise ScoringError(
                f"no document could be scored of {QUERIES_IN_VAIN} queries in a row, the last {task.candidates.query}: "
                f"{cause}",
                cause=cause,
            )


def _raise_if_no_document_is_to_blame(error: RerankError) -> None:
    """Raise ``error`` if no worker is left."""
    if isinstance(error, WorkerCrashedError) and error.document_index is None:
        raise error


# Writing, and what is there already.


class _Output:
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

    def write(self, candidates: _Candidates, scores: Sequence[float | None]) -> None:
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

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _already(
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


# Reading.


def _opened(path: str | Path, mode: str = "rb", buffering: int = -1) -> BinaryIO:
    try:
        return open(path, mode, buffering)  # type: ignore[return-value]
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def _columns(path: str | Path, count: int) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and columns of a file with ``count`` columns, separated by white space. Blank lines are skipped."""
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
            raise ValueError(f"{run}: the lines of query {one_line(candidates.query)} do not stand together")
        if len(set(candidates.documents)) != len(candidates.documents):
            raise ValueError(f"{run}: query {one_line(candidates.query)} has a document twice")
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
            raise ValueError(f"{path}: query {one_line(query)} of {run} is not in it")
    return texts


class _Corpus:
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
