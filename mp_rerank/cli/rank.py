"""``mp-rerank rank``: rank documents by their relevance to a query."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import as_completed
from typing import Any

import numpy as np

from mp_rerank._text import one_line
from mp_rerank.cli import streams
from mp_rerank.cli.documents import Document, read_documents
from mp_rerank.cli.options import add_model, add_network, add_workers, pool_of, spec_of
from mp_rerank.cli.streams import InputError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import Scores

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "rank documents"
DESCRIPTION = "Rank documents by a query."

# Pairs of one request: few enough for a progress bar to move, and enough to share among workers.
CHUNK = 256
PROGRESS_AFTER_SECONDS = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_model(parser)
    add_workers(parser)
    parser.add_argument("query", metavar="QUERY")
    parser.add_argument("file", metavar="FILE", nargs="?", default="-", help="the documents (default: standard input)")
    parser.add_argument("--top-n", type=int, metavar="N", help="print the best N only")
    parser.add_argument(
        "--format",
        choices=("lines", "jsonl"),
        help="lines: one document a line; jsonl: one JSON string or object a line (default: by the file's name)",
    )
    parser.add_argument("--field", default="text", help="where a JSON object has its text (default: text)")
    add_network(parser)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    streams.check_output()
    if arguments.top_n is not None and arguments.top_n < 0:
        raise InputError(f"--top-n: at least 0 is needed, not {arguments.top_n}")
    pool = pool_of(arguments, spec_of(arguments))
    documents = read_documents(arguments.file, arguments.format, arguments.field)  # before anything is started
    with pool:
        scores = _score(pool, arguments.query, documents)
    order = np.argsort(-scores, kind="stable")[: arguments.top_n].tolist()  # NaN comes last
    if arguments.json:
        streams.write_json([_as_json(i, scores[i], documents[i]) for i in order])
    else:
        _print_table((rank, float(scores[i]), documents[i].text) for rank, i in enumerate(order, 1))
    return 0


def _score(pool: RerankerPool, query: str, documents: Sequence[Document]) -> Scores:
    """Scores of all documents, with a progress bar on a terminal if it takes long."""
    from tqdm import tqdm

    texts = [document.text for document in documents]
    scores = np.empty(len(texts), dtype=np.float32)
    starts = {
        pool.submit_pairs([(query, text) for text in texts[start : start + CHUNK]]): start
        for start in range(0, len(texts), CHUNK)
    }
    with tqdm(total=len(texts), unit="doc", delay=PROGRESS_AFTER_SECONDS, disable=None, leave=False) as bar:
        for future in as_completed(starts):
            part = future.result()
            scores[starts[future] : starts[future] + len(part)] = part
            bar.update(len(part))
    return scores


def _as_json(index: int, score: float, document: Document) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "relevance_score": float(score), "document": document.text}
    if document.record is not None:
        shown["record"] = document.record
    return shown


def _print_table(rows: Iterable[tuple[int, float, str]]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    streams.write("rank    score  document")
    for rank, score, text in rows:
        line = f"{rank:>4}  {score:7.4f}  {one_line(' '.join(text.split()))}"
        streams.write(line if width is None or len(line) <= width else line[: width - 1] + "…")
