"""``mp-rerank race``: whether threads with a ``CrossEncoder`` go wrong here."""

from __future__ import annotations

import argparse

__all__ = ["DESCRIPTION", "HELP", "add_arguments", "call"]

HELP = "show whether threads with a CrossEncoder go wrong here"
DESCRIPTION = (
    "Load and score in threads, with CrossEncoder and with the pool, on a model made for it. "
    "Exit code 3: CrossEncoder in threads went wrong here; 0: it did not; 1: the pool did."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="threads that race (default: 8)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each case is run (default: 3)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(verbose=False)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    from mp_rerank.race.command import run

    return run(arguments)
