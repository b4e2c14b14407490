"""``mp-rerank plan``: the workers that a pool would start, and why."""

from __future__ import annotations

import argparse
import dataclasses

from mp_rerank.cli import streams
from mp_rerank.cli.options import add_model, add_workers, pool_of
from mp_rerank.config import ModelSpec

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "show the workers a pool would start, and why"
DESCRIPTION = "Show the workers a pool would start, and why."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    add_model(parser)
    add_workers(parser)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    plan = pool_of(arguments, ModelSpec(arguments.model)).plan
    if arguments.json:
        streams.write_json(dataclasses.asdict(plan))
        return 0
    for reason in plan.reasons:
        streams.write(reason)
    for number, seat in enumerate(plan.seats):
        streams.write(f"worker {number}: {seat.device}, {seat.threads} thread{'s' if seat.threads > 1 else ''}")
    return 0
