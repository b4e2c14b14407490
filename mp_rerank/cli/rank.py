"""``mp-rerank rank``: rank documents by their relevance to a query."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from typing import Any

from mp_rerank._arguments import RequestKeywords
from mp_rerank._pairs import estimate_pair, estimate_text
from mp_rerank._planning.plan import worthwhile_workers
from mp_rerank._text import one_line
from mp_rerank.cli import streams
from mp_rerank.cli.documents import Document, read_documents
from mp_rerank.cli.options import add_model, add_network, add_reading, add_workers, pool_of, reading_options, spec_of
from mp_rerank.cli.streams import InputError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import RerankResult

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "rank documents"
DESCRIPTION = "Rank documents by a query."

PROGRESS_AFTER_SECONDS = 1.0
PROGRESS_SECONDS = 0.2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_model(parser)
    add_workers(parser)
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="the documents (default: standard input)")
    parser.add_argument("--top-n", type=int, metavar="N", help="print the best N only")
    parser.add_argument("--min-score", type=float, metavar="S", help="leave out what scores less")
    parser.add_argument(
        "--show-passage",
        action="store_true",
        help="print the best part of a document that was divided",
    )
    parser.add_argument(
        "--format",
        choices=("lines", "jsonl"),
        help="lines: one document a line; jsonl: one JSON string or object a line (default: by the file's name)",
    )
    parser.add_argument("--field", default="text", help="where a JSON object has its text (default: text)")
    add_reading(parser)
    add_network(parser)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    streams.check_output()
    if arguments.top_n is not None and arguments.top_n < 0:
        raise InputError(f"--top-n: at least 0 is needed, not {arguments.top_n}")
    options: RequestKeywords = {**reading_options(arguments), "min_score": arguments.min_score}
    pool = pool_of(arguments, spec_of(arguments))
    documents = read_documents(arguments.file, arguments.format, arguments.field)  # before anything is started
    with _no_larger_than_worthwhile(pool, arguments.query, documents) as fitted:
        results = _rank(fitted, arguments.query, documents, arguments.top_n, options)
    if arguments.json:
        streams.write_json([_as_json(result, documents[result.index]) for result in results])
    else:
        _print_table(results, show_passage=arguments.show_passage)
    return 0


def _no_larger_than_worthwhile(pool: RerankerPool, query: str, documents: Sequence[Document]) -> RerankerPool:
    """``pool``, or one of fewer workers on the CPU, where the documents are too few to keep all of them busy."""
    seats = pool.plan.seats
    if pool.config.workers is not None or any(not seat.device.startswith("cpu") for seat in seats):
        return pool
    asked = estimate_text(query)
    tokens = sum(estimate_pair(asked, document.text, pool.spec.max_length) for document in documents)
    workers = min(len(seats), worthwhile_workers(pool.spec, tokens))
    if workers == len(seats):
        return pool
    config = replace(pool.config, devices="cpu", workers=workers, threads_per_worker=seats[0].threads)
    return RerankerPool(pool.spec, **vars(config))


def _rank(
    pool: RerankerPool, query: str, documents: Sequence[Document], top_n: int | None, options: RequestKeywords
) -> list[RerankResult]:
    """The results, with a progress bar on a terminal if it takes long."""
    from tqdm import tqdm

    future = pool.submit(query, [document.text for document in documents], top_n=top_n, **options)
    with tqdm(total=len(documents), unit="doc", delay=PROGRESS_AFTER_SECONDS, disable=None, leave=False) as bar:
        while True:
            try:
                return future.result(PROGRESS_SECONDS)
            except FutureTimeoutError:
                stats = pool.stats()
                bar.update(stats.scored_pairs + stats.coalesced_pairs - bar.n)


def _as_json(result: RerankResult, document: Document) -> dict[str, Any]:
    shown: dict[str, Any] = {
        "index": result.index,
        "relevance_score": result.relevance_score,
        "document": result.document,
        "tokens": result.tokens,
        "truncated": result.truncated,
    }
    if result.passage is not None:
        start, end = result.passage
        shown["passage"] = {"start": start, "end": end, "text": result.document[start:end]}
    if document.record is not None:
        shown["record"] = document.record
    return shown


def _print_table(results: Iterable[RerankResult], *, show_passage: bool) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    streams.write("rank    score  document")
    for rank, result in enumerate(results, 1):
        text = result.document
        if show_passage and result.passage is not None:
            start, end = result.passage
            text = f"[{start}:{end}] {text[start:end]}"
        score = "nan" if result.relevance_score is None else f"{result.relevance_score:.4f}"
        line = f"{rank:>4}  {score:>7}  {one_line(' '.join(text.split()))}"
        streams.write(line if width is None or len(line) <= width else line[: width - 1] + "…")
