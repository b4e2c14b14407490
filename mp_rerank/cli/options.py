"""Options that several commands take, and what is made of them."""

from __future__ import annotations

import argparse

from mp_rerank.config import BUILTIN, ModelSpec
from mp_rerank.pool import RerankerPool

__all__ = ["PROGRAM", "add_model", "add_network", "add_workers", "pool_of", "spec_of"]

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


def add_network(parser: argparse.ArgumentParser, *, backend: bool = True) -> None:
    """How the model computes."""
    parser.add_argument("--dtype", help="float32, bfloat16, float16, auto, or int8 with another backend")
    if backend:
        parser.add_argument("--backend", default="torch", help="torch, onnx or openvino (default: torch)")
    parser.add_argument("--max-length", type=int, metavar="N", help="truncate pairs to so many tokens")


def spec_of(arguments: argparse.Namespace) -> ModelSpec:
    """The model that ``add_model`` and ``add_network`` ask for."""
    backend = getattr(arguments, "backend", "torch")
    return ModelSpec(arguments.model, dtype=arguments.dtype, max_length=arguments.max_length, backend=backend)


def pool_of(arguments: argparse.Namespace, spec: ModelSpec) -> RerankerPool:
    """The pool that ``add_model`` and ``add_workers`` ask for; not started."""
    return RerankerPool(
        spec, devices=arguments.devices, workers=arguments.workers, threads_per_worker=arguments.threads
    )
