"""How the built-in model was made: `python -m bench builtin STEP ...`, the steps in their order.

    collect   sets and documentation        -> passages.jsonl
    queries   passages                      -> queries.jsonl
    teach     BM25 + bi-encoder on those    -> lists.jsonl, calibration.json
    contrast  answers about something else -> more passages, queries and lists
    train     a three-layer cross-encoder   -> checkpoint/
    average   with the weights before       -> a model, by the development sets
    export    float16 weights, calibrated   -> the folder that is shipped

Every step but `average`, which takes two models, reads and writes one `--work` folder; each is seeded where it draws
anything, and can be run again by itself.
"""

import importlib
import sys

STEPS = ("collect", "queries", "teach", "contrast", "train", "average", "export")


def main(argv: list[str]) -> int:
    """Hand the rest of the command line to the step's module."""
    if not argv or argv[0] not in STEPS:
        print(__doc__, file=sys.stderr)
        return 0 if argv in (["-h"], ["--help"]) else 2
    return importlib.import_module(f"bench.builtin.{argv[0]}").main(argv[1:]) or 0
