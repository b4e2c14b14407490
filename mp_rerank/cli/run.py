"""``mp-rerank run``: rerank the candidates of many queries, from files to a file."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
from collections.abc import Sequence

from mp_rerank import bulk
from mp_rerank._text import one_line
from mp_rerank.cli import streams
from mp_rerank.cli.options import (
    add_cluster,
    add_model,
    add_network,
    add_reading,
    add_workers,
    pool_of,
    reading_options,
    spec_of,
)
from mp_rerank.cli.streams import InputError

__all__ = ["DESCRIPTION", "HELP", "NOT_ALL", "add_arguments", "call"]

HELP = "rerank a whole run, from files to a file"
DESCRIPTION = (
    "Rerank the candidates of many queries. Interrupted, it goes on from there when it is run again. "
    "Exit code 3: it is done, but some documents could not be scored; they stand last."
)

# The exit code where some documents could not be scored.
NOT_ALL = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_model(parser)
    add_workers(parser)
    add_cluster(parser)
    parser.add_argument("--queries", required=True, metavar="FILE", help="BEIR's JSONL, or lines of id, tab, text")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="BEIR's JSONL, or lines of id, tab, text")
    parser.add_argument(
        "--run", required=True, metavar="FILE", dest="candidates", help="the first stage's, as TREC has it"
    )
    parser.add_argument("--output", required=True, metavar="FILE", help="the run to write, or to go on with")
    parser.add_argument("--top-n", type=int, metavar="N", help="write the best N of each query only")
    parser.add_argument("--overwrite", action="store_true", help="begin again, whatever is in the output")
    parser.add_argument("--qrels", metavar="FILE", help="judgements, TREC's or BEIR's: print measures of both runs")
    parser.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="which measures (default: nDCG@10 RR@10 R@100; needs ir-measures)"
    )
    add_reading(parser)
    add_network(parser)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    measures = _measures(arguments)
    if arguments.json or arguments.qrels:
        streams.check_output()
    done = _rerank(arguments)
    print(f"{one_line(arguments.output)}: {done}", file=sys.stderr)
    runs = [arguments.candidates, arguments.output] if arguments.qrels else []
    means = bulk.evaluate(arguments.qrels, runs, measures) if runs else []
    if arguments.json:
        streams.write_json({**dataclasses.asdict(done), "metrics": dict(zip(runs, means, strict=True))})
    elif runs:
        _print_table(runs, means)
    return NOT_ALL if done.failures else 0


def _measures(arguments: argparse.Namespace) -> Sequence[str]:
    """The measures to print, known to be good before the work begins."""
    if arguments.metrics and not arguments.qrels:
        raise InputError("--metrics: they need --qrels")
    measures = arguments.metrics or bulk.DEFAULT_MEASURES
    if arguments.qrels:
        try:
            bulk.parse_measures(measures)
        except ModuleNotFoundError as error:
            raise InputError(str(error)) from error
    return measures


def _rerank(arguments: argparse.Namespace) -> bulk.BulkSummary:
    if not sys.stderr.isatty():  # no bar: its place is taken by a line a minute
        logging.getLogger(bulk.__name__).setLevel(logging.INFO)
    spec = spec_of(arguments)
    options = reading_options(arguments)
    pool = pool_of(arguments, spec)
    with contextlib.closing(pool):
        return bulk.rerank_run(
            pool,
            queries=arguments.queries,
            corpus=arguments.corpus,
            run=arguments.candidates,
            output=arguments.output,
            top_n=arguments.top_n,
            tag=bulk.model_tag(spec),
            overwrite=arguments.overwrite,
            progress=None,
            **options,
        )


def _print_table(runs: Sequence[str], means: Sequence[dict[str, float]]) -> None:
    width = max(map(len, runs))
    streams.write("  ".join(["run".ljust(width), *means[0]]))
    for name, row in zip(runs, means, strict=True):
        streams.write("  ".join([one_line(name).ljust(width), *(f"{v:.4f}".rjust(len(k)) for k, v in row.items())]))
