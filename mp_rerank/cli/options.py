"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import argparse

from mp_rerank._arguments import RequestKeywords, RequestOptions
from mp_rerank.cli.streams import InputError
from mp_rerank.config import BUILTIN, START_METHODS, ModelSpec
from mp_rerank.pool import RerankerPool

__all__ = [
    "PROGRAM",
    "add_cluster",
    "add_model",
    "add_network",
    "add_reading",
    "add_workers",
    "pool_of",
    "reading_options",
    "spec_of",
]

PROGRAM = "mp-rerank"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, where; how to print and log."""
    parser.add_argument("--model", default=BUILTIN, help="a hub name or a local folder (default: the built-in model)")
    parser.add_argument(
        "--devices",
        default=["auto"],
        type=lambda names: names.split(","),
        metavar="DEVICE[,DEVICE...]",
        help="auto, cpu, cuda, cuda:1, mps, …",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what the pool and its workers do")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """How many workers, and how many threads each."""
    parser.add_argument("--workers", type=int, metavar="N", help="workers in all (default: see `mp-rerank plan`)")
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads a worker")
    parser.add_argument(
        "--start-method",
        choices=START_METHODS,
        default="spawn",
        help="how workers are started; fork-model (Linux, CPU) loads the model once for all (default: spawn)",
    )


def add_cluster(parser: argparse.ArgumentParser) -> None:
    """Workers of a Dask cluster."""
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="score in the workers of a Dask cluster: the scheduler's address, such as tcp://10.0.0.1:8786 "
        "(with --workers, in so many here too)",
    )


def add_network(parser: argparse.ArgumentParser, *, backend: bool = True) -> None:
    """How the model computes."""
    parser.add_argument("--dtype", help="float32, bfloat16, float16, auto, or int8 with another backend")
    if backend:
        parser.add_argument("--backend", default="torch", help="torch, onnx or openvino (default: torch)")
    parser.add_argument("--max-length", type=int, metavar="N", help="truncate pairs to so many tokens")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """How the model reads its texts: options of a request."""
    group = parser.add_argument_group("how texts are read")
    group.add_argument("--instruction", metavar="TEXT", help="what to judge by; goes before the query")
    group.add_argument("--prompt-name", metavar="NAME", help="one of the model's own prompts, in its place")
    group.add_argument("--max-tokens-per-doc", type=int, metavar="N", help="read so many tokens of a document")
    group.add_argument(
        "--truncation",
        choices=("end", "start", "error"),
        default="end",
        help="what is cut off where a document is too long, or that it is an error (default: end)",
    )
    group.add_argument(
        "--long-documents",
        choices=("truncate", "chunk"),
        default="truncate",
        help="chunk: score a document that is too long for the model in parts; the best counts (default: truncate)",
    )


def reading_options(arguments: argparse.Namespace) -> RequestKeywords:
    """The options that ``add_reading`` asks for, checked before anything is started."""
    options: RequestKeywords = {
        "instruction": arguments.instruction,
        "prompt_name": arguments.prompt_name,
        "max_tokens_per_doc": arguments.max_tokens_per_doc,
        "truncation": arguments.truncation,
        "long_documents": arguments.long_documents,
    }
    try:
        RequestOptions.of(options)
    except (TypeError, ValueError) as error:
        raise InputError(f"--{str(error).replace('_', '-')}") from error
    return options


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """The model that ``add_model`` and ``add_network`` ask for."""
    backend = getattr(arguments, "backend", "torch")
    return ModelSpec(arguments.model, dtype=arguments.dtype, max_length=arguments.max_length, backend=backend)


def pool_of(arguments: argparse.Namespace, spec: ModelSpec) -> RerankerPool:
    """The pool that ``add_model`` and ``add_workers`` ask for; not started. What has no score does not end its work."""
    return RerankerPool(
        spec,
        devices=arguments.devices,
        workers=arguments.workers,
        threads_per_worker=arguments.threads,
        start_method=arguments.start_method,
        nan_scores="none",
        cluster=getattr(arguments, "cluster", None),
    )
