"""`python -m bench race-where`: which state of the process two threads change at once, with both their stacks.

`mp-rerank race` counts what goes wrong when threads load and score with `CrossEncoder`; this command shows where. It
runs `race_watch.py` in a process of its own, offline and with one thread for each computation. docs/race.md explains
what it prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mp_rerank.race.command import run_module

LIMIT_SECONDS = 900.0


def main(argv: Sequence[str]) -> int:
    """Watch and print; 1 if the process that watches failed or hung."""
    parser = argparse.ArgumentParser(
        prog="python -m bench race-where", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=8, metavar="N", help="threads that race (default 8)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(argv)
    if options.threads < 2:
        parser.error(f"--threads: at least 2 are needed, not {options.threads}")
    arguments = [str(options.threads), "json" if options.json else "text"]
    lines, failure = run_module("bench.faults.race_watch", arguments, LIMIT_SECONDS)
    print("\n".join(lines))
    if failure:
        print(f"{parser.prog}: {failure}", file=sys.stderr)
    return int(bool(failure))
