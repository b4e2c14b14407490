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

import logging
import os
import re
import time
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank._checks import check_flag, check_optional_count, check_text
from mp_rerank._run_files import (
    Candidates,
    Corpus,
    Output,
    already_written,
    columns_of,
    groups,
    read_qrels,
    read_queries,
    survey,
)
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
    counts, wanted = survey(run)
    texts = read_queries(queries, counts, run)
    found, keep_bytes = already_written(output, counts, top_n, tag, overwrite)
    left = sum(list(counts.values())[found:])
    with Corpus(corpus, wanted, run) as documents, Output(output, keep_bytes, top_n, tag) as out:
        if left:
            pool.start()
        start = time.perf_counter()
        if found:
            logger.info("%s: %d of %d queries are there already", one_line(output), found, len(counts))
        with (
            tqdm(total=left, unit="pair", disable=None if progress is None else not progress) as bar,
            _InFlight(pool, out.write, _Told(output, left, bar.update).advance, options) as in_flight,
        ):
            for candidates in islice(groups(run), found, None):
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
    judged = read_qrels(qrels)
    import ir_measures

    results = []
    for run in runs:
        scores: dict[str, dict[str, float]] = {}
        for number, columns in columns_of(run, 6):
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


@dataclass
class _Task:
    """A query in flight.

    Attributes:
        candidates: the ids.
        query, documents: the texts.
        sent: which of the documents were sent to the pool, by their places.
        future: their ranking.
    """

    candidates: Candidates
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
        write: Callable[[Candidates, Sequence[float | None]], None],
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
