"""``mp-rerank tune``: measure which workers, threads and batches are fastest here."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from mp_rerank import tune
from mp_rerank.cli import streams
from mp_rerank.cli.documents import read_documents
from mp_rerank.cli.options import add_model, add_network, spec_of
from mp_rerank.cli.streams import InputError

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "measure which workers, threads and batches are fastest here"
DESCRIPTION = (
    "Measure workers, threads and batch sizes in turns, and keep the fastest for later pools of this model on this "
    "machine. Scores do not depend on them. With MP_RERANK_TUNED=0 or tuned=False a pool ignores it."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_model(parser)
    parser.add_argument("--seconds", type=float, default=120.0, help="when to stop (default: 120)")
    parser.add_argument("--words", type=int, nargs="+", metavar="N", help="typical lengths of a document, in words")
    parser.add_argument("--corpus", metavar="FILE", help="documents to measure with: lines, or JSONL with a text")
    add_network(parser, backend=False)
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=[],
        metavar="DTYPE",
        help="measure these dtypes as well, with the fastest setup; a pool uses one only if it is asked for, since "
        "scores differ",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    streams.check_output()
    if not arguments.seconds > 0:
        raise InputError(f"--seconds: more than 0 are needed, not {arguments.seconds:g}")
    words = arguments.words or tune.DEFAULT_WORDS
    if min(words) < 1:
        raise InputError(f"--words: at least 1 is needed, not {min(words)}")
    spec = spec_of(arguments)
    spec.check_exists()
    variants = [dataclasses.replace(spec, dtype=dtype) for dtype in arguments.dtypes]
    if arguments.corpus:
        documents = [document.text for document in read_documents(arguments.corpus)]
    else:
        documents = tune.random_documents(words)
    report = tune.tune(
        spec,
        tune.make_pairs(documents),
        devices=arguments.devices,
        seconds=arguments.seconds,
        variants=variants,
        keep=not arguments.dry_run,
        progress=_show,
    )
    if arguments.json:
        streams.write_json(dataclasses.asdict(report))
    else:
        _print_table(report)
    return 0


def _show(trial: tune.Trial) -> None:
    rate = f"{trial.pairs_per_second:8.1f} pairs/s, {trial.ratio:.2f} times" if trial.pairs_per_second else ""
    print(f"{trial.setup}:{rate} {trial.verdict}", file=sys.stderr)


def _print_table(report: tune.Report) -> None:
    best = report.best
    assert best is not None
    streams.write("workers  threads  batch tokens  dtype      pairs/s  of the best's  scores differ by")
    for trial in (*report.trials, *report.variants):
        setup = trial.setup
        streams.write(
            f"{setup.workers:>7}  {setup.threads:>7}  {setup.batch_tokens:>12}  {setup.spec.dtype or 'default':<8} "
            f"{trial.pairs_per_second:>8.1f}  {trial.ratio:>13.2f}  {trial.score_difference:>16.1e}  {trial.verdict}"
        )
    kept = "kept for this model on this machine" if report.kept else "nothing is kept"
    streams.write(
        f"\nThe fastest: {best.setup}: {report.times_the_default:.2f} times the default's speed; {kept}. "
        f"{report.seconds:.0f} s."
    )
