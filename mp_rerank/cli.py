"""``mp-rerank``, the command.

    mp-rerank rank QUERY [FILE]     rank the documents of FILE, or of standard input
    mp-rerank run --queries Q --corpus C --run R --output O
                                    rerank a whole run of a first stage, from files to a file
    mp-rerank plan                  which workers a pool would start here, and why
    mp-rerank tune                  measure which are fastest here, for the pools that come after

Exit codes: 0; 1 where the work failed; 2 for a mistake in the call or in the input; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mp_rerank
from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.errors import RerankError
from mp_rerank.pool import RerankerPool
from mp_rerank.results import Scores

__all__ = ["main"]

JSONL_SUFFIXES = (".jsonl", ".ndjson")
# Pairs of one request: small enough for a progress bar to move, large enough to be shared out among workers.
CHUNK = 256
PROGRESS_AFTER_SECONDS = 1.0
INTERRUPTED = 130


class _InputError(Exception):
    """The input is not what it should be; the message is for the user."""


@dataclass(frozen=True)
class _Document:
    text: str
    record: Any = None  # the JSON object it came in, if it did


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on ``argv``, or on the process's own arguments; returns the exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        format=f"{parser.prog}: %(message)s", level=logging.INFO if arguments.verbose else logging.WARNING
    )
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except (_InputError, TypeError, ValueError) as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except RerankError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mp-rerank", description="Rerank documents with a cross-encoder, in a pool of worker processes."
    )
    parser.add_argument("--version", action="version", version=f"mp-rerank {mp_rerank.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    basic = argparse.ArgumentParser(add_help=False)
    basic.add_argument("--model", default=BUILTIN, help="a hub name or a local folder (default: the built-in model)")
    basic.add_argument(
        "--devices",
        default=["auto"],
        type=lambda names: names.split(","),
        metavar="DEVICE[,DEVICE...]",
        help="auto, cpu, cuda, cuda:1, mps, …",
    )
    basic.add_argument("--json", action="store_true", help="print JSON")
    basic.add_argument("-v", "--verbose", action="store_true", help="log what the pool and its workers do")
    common = argparse.ArgumentParser(add_help=False, parents=[basic])
    common.add_argument("--workers", type=int, metavar="N", help="workers in all (default: see `mp-rerank plan`)")
    common.add_argument("--threads", type=int, metavar="N", help="compute threads a worker")

    rank = commands.add_parser(
        "rank", parents=[common], help="rank documents", description="Rank documents by a query."
    )
    rank.add_argument("query", metavar="QUERY")
    rank.add_argument("file", metavar="FILE", nargs="?", default="-", help="the documents (default: standard input)")
    rank.add_argument("--top-n", type=int, metavar="N", help="print the best N only")
    rank.add_argument(
        "--format",
        choices=("lines", "jsonl"),
        help="lines: one document a line; jsonl: one JSON string or object a line (default: by the file's name)",
    )
    rank.add_argument("--field", default="text", help="where a JSON object has its text (default: text)")
    _add_network_options(rank)
    rank.add_argument("--max-length", type=int, metavar="N", help="truncate pairs to so many tokens")
    rank.set_defaults(run=_rank)

    plan = commands.add_parser("plan", parents=[common], help="show the workers a pool would start, and why")
    plan.set_defaults(run=_plan)

    tune = commands.add_parser(
        "tune",
        parents=[basic],
        help="measure which workers, threads and batches are fastest here",
        description="Measure workers, threads and batch sizes in turns, and keep the fastest for the pools that come "
        "after, of this model on this machine. Scores do not depend on them. MP_RERANK_TUNED=0 or tuned=False has a "
        "pool ignore it.",
    )
    tune.add_argument("--seconds", type=float, default=120.0, help="when to stop (default: 120)")
    tune.add_argument("--words", type=int, nargs="+", metavar="N", help="typical lengths of a document, in words")
    tune.add_argument("--corpus", metavar="FILE", help="documents to measure with: lines, or JSONL with a text")
    tune.add_argument("--dtype", help="of the model to tune: float32, bfloat16, float16 or auto")
    tune.add_argument("--max-length", type=int, metavar="N", help="truncate pairs to so many tokens")
    tune.add_argument(
        "--dtypes",
        nargs="+",
        default=[],
        metavar="DTYPE",
        help="measure these as well, with what was fastest; their scores differ, so a pool has them only by its dtype",
    )
    tune.add_argument("--dry-run", action="store_true", help="measure, and keep nothing")
    tune.set_defaults(run=_tune)

    run = commands.add_parser(
        "run",
        parents=[common],
        help="rerank a whole run, from files to a file",
        description="Rerank the candidates of many queries. Ended in the middle, it goes on from there when run again.",
    )
    run.add_argument("--queries", required=True, metavar="FILE", help="BEIR's JSONL, or lines of id, tab, text")
    run.add_argument("--corpus", required=True, metavar="FILE", help="BEIR's JSONL, or lines of id, tab, text")
    run.add_argument(
        "--run", required=True, metavar="FILE", dest="candidates", help="the first stage's, as TREC has it"
    )
    run.add_argument("--output", required=True, metavar="FILE", help="the run to write, or to go on with")
    run.add_argument("--top-n", type=int, metavar="N", help="write the best N of each query only")
    run.add_argument("--overwrite", action="store_true", help="begin again, whatever is in the output")
    run.add_argument("--qrels", metavar="FILE", help="judgements, TREC's or BEIR's: print measures of both runs")
    run.add_argument(
        "--metrics", nargs="+", metavar="NAME", help="which measures (default: nDCG@10 RR@10 R@100; needs ir-measures)"
    )
    _add_network_options(run)
    run.add_argument("--max-length", type=int, metavar="N", help="truncate pairs to so many tokens")
    run.set_defaults(run=_run)

    race = commands.add_parser(
        "race",
        help="show whether threads with a CrossEncoder go wrong here",
        description="Load and score in threads, with CrossEncoder and with the pool, on a model made for it. "
        "Exit code 3: CrossEncoder in threads went wrong here; 0: it did not; 1: the pool did.",
    )
    race.add_argument("--threads", type=int, default=8, metavar="N", help="threads that race (default: 8)")
    race.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each case is run (default: 3)")
    race.add_argument("--json", action="store_true", help="print JSON")
    race.set_defaults(run=_race, verbose=False)
    return parser


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", help="float32, bfloat16, float16, auto, or int8 with another backend")
    parser.add_argument("--backend", default="torch", help="torch, onnx or openvino (default: torch)")


def _spec(arguments: argparse.Namespace) -> ModelSpec:
    return ModelSpec(arguments.model, dtype=arguments.dtype, max_length=arguments.max_length, backend=arguments.backend)


def _race(arguments: argparse.Namespace) -> int:
    from mp_rerank.race.command import run

    return run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from mp_rerank import bulk

    if arguments.metrics and not arguments.qrels:
        raise _InputError("--metrics: they need --qrels")
    measures = arguments.metrics or bulk.DEFAULT_MEASURES
    if arguments.qrels:
        try:
            bulk.parse_measures(measures)  # before the work and not after it
        except ModuleNotFoundError as error:
            raise _InputError(str(error)) from error
    spec = _spec(arguments)
    pool = RerankerPool(
        spec, devices=arguments.devices, workers=arguments.workers, threads_per_worker=arguments.threads
    )
    with contextlib.closing(pool):
        done = bulk.rerank_run(
            pool,
            queries=arguments.queries,
            corpus=arguments.corpus,
            run=arguments.candidates,
            output=arguments.output,
            top_n=arguments.top_n,
            tag=bulk.model_tag(spec),
            overwrite=arguments.overwrite,
            progress=None,
        )
    print(f"{arguments.output}: {done}", file=sys.stderr)
    runs = [arguments.candidates, arguments.output] if arguments.qrels else []
    means = bulk.evaluate(arguments.qrels, runs, measures) if runs else []
    if arguments.json:
        print(json.dumps({**dataclasses.asdict(done), "metrics": dict(zip(runs, means, strict=True))}, indent=2))
    elif runs:
        print("  ".join(["run".ljust(max(map(len, runs))), *means[0]]))
        for name, row in zip(runs, means, strict=True):
            print("  ".join([name.ljust(max(map(len, runs))), *(f"{v:.4f}".rjust(len(k)) for k, v in row.items())]))
    return 0


def _rank(arguments: argparse.Namespace) -> int:
    if arguments.top_n is not None and arguments.top_n < 0:
        raise _InputError(f"--top-n: at least 0 is needed, not {arguments.top_n}")
    spec = _spec(arguments)
    pool = RerankerPool(
        spec, devices=arguments.devices, workers=arguments.workers, threads_per_worker=arguments.threads
    )
    documents = _read(
        arguments.file, arguments.format, arguments.field
    )  # before anything is started for a file that is not there
    with pool:
        scores = _score(pool, arguments.query, documents)
    order = np.argsort(-scores, kind="stable")[: arguments.top_n].tolist()
    if arguments.json:
        print(json.dumps([_as_json(i, scores[i], documents[i]) for i in order], ensure_ascii=False, indent=2))
    else:
        _print_table((rank, float(scores[i]), documents[i].text) for rank, i in enumerate(order, 1))
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    pool = RerankerPool(
        arguments.model, devices=arguments.devices, workers=arguments.workers, threads_per_worker=arguments.threads
    )
    if arguments.json:
        print(json.dumps(dataclasses.asdict(pool.plan), indent=2))
        return 0
    for reason in pool.plan.reasons:
        print(reason)
    for number, seat in enumerate(pool.plan.seats):
        print(f"worker {number}: {seat.device}, {seat.threads} thread{'s' if seat.threads > 1 else ''}")
    return 0


def _tune(arguments: argparse.Namespace) -> int:
    from mp_rerank.tune import DEFAULT_WORDS, Trial, make_pairs, random_documents, tune

    if arguments.seconds <= 0:
        raise _InputError(f"--seconds: more than 0 are needed, not {arguments.seconds:g}")
    words = arguments.words or DEFAULT_WORDS
    if min(words) < 1:
        raise _InputError(f"--words: at least 1 is needed, not {min(words)}")
    spec = ModelSpec(arguments.model, dtype=arguments.dtype, max_length=arguments.max_length)
    spec.check_exists()
    variants = [dataclasses.replace(spec, dtype=dtype) for dtype in arguments.dtypes]
    documents = [document.text for document in _read(arguments.corpus)] if arguments.corpus else random_documents(words)

    def show(trial: Trial) -> None:
        rate = f"{trial.pairs_per_second:8.1f} pairs/s, {trial.ratio:.2f} times" if trial.pairs_per_second else ""
        print(f"{trial.setup}:{rate} {trial.verdict}", file=sys.stderr)

    report = tune(
        spec,
        make_pairs(documents),
        devices=arguments.devices,
        seconds=arguments.seconds,
        variants=variants,
        keep=not arguments.dry_run,
        progress=show,
    )
    best = report.best
    assert best is not None
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report), indent=2))
        return 0
    print("workers  threads  batch tokens  dtype      pairs/s  of the best's  scores differ by")
    for trial in (*report.trials, *report.variants):
        setup = trial.setup
        print(
            f"{setup.workers:>7}  {setup.threads:>7}  {setup.batch_tokens:>12}  {setup.spec.dtype or 'default':<8} "
            f"{trial.pairs_per_second:>8.1f}  {trial.ratio:>13.2f}  {trial.score_difference:>16.1e}  {trial.verdict}"
        )
    kept = "kept for this model on this machine" if report.kept else "nothing is kept"
    print(
        f"\nThe fastest: {best.setup}: {report.times_the_default:.2f} times the default's speed; {kept}. "
        f"{report.seconds:.0f} s."
    )
    return 0


def _score(pool: RerankerPool, query: str, documents: Sequence[_Document]) -> Scores:
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


def _read(name: str, form: str | None = None, field: str = "text") -> list[_Document]:
    lines: Iterable[bytes]
    if name == "-":
        lines = sys.stdin.buffer
    else:
        try:
            lines = Path(name).read_bytes().splitlines()
        except OSError as error:
            raise _InputError(f"{name}: {error.strerror}") from error
    form = form or ("jsonl" if name.endswith(JSONL_SUFFIXES) else "lines")
    where = "standard input" if name == "-" else name
    documents = list(_parse(lines, where, form, field))
    if not documents:
        raise _InputError(f"{where}: there are no documents in it")
    return documents


def _parse(lines: Iterable[bytes], where: str, form: str, field: str) -> Iterator[_Document]:
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            raise _InputError(f"{where}, line {number}: not UTF-8: {error.reason}") from error
        if not text:
            continue
        if form == "lines":
            yield _Document(text)
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise _InputError(f"{where}, line {number}: not JSON: {error.msg} (column {error.colno})") from error
        if isinstance(value, str):
            yield _Document(value)
        elif isinstance(value, dict) and isinstance(value.get(field), str):
            yield _Document(value[field], value)
        else:
            raise _InputError(f"{where}, line {number}: neither a string nor an object with a string as {field!r}")


def _as_json(index: int, score: float, document: _Document) -> dict[str, Any]:
    shown: dict[str, Any] = {"index": index, "relevance_score": float(score), "document": document.text}
    if document.record is not None:
        shown["record"] = document.record
    return shown


def _print_table(rows: Iterable[tuple[int, float, str]]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    print("rank    score  document")
    for rank, score, text in rows:
        line = f"{rank:>4}  {score:7.4f}  {' '.join(text.split())}"
        print(line if width is None or len(line) <= width else line[: width - 1] + "…")


if __name__ == "__main__":
    sys.exit(main())
