"""The making of the built-in model: `python -m bench builtin STEP ...`, in these steps.

    collect   sets and documentation          -> passages.jsonl
    queries   passages                        -> queries.jsonl
    teach     BM25 and bi-encoder on those    -> lists.jsonl, calibration.json
    contrast  passages with swapped names     -> more passages, queries and lists
    train     a cross-encoder of three layers -> checkpoint/
    average   weights of two trainings        -> a model, chosen by the development sets
    export    float16 weights, calibrated     -> the folder that is shipped

Every step but `average`, which takes two models, reads and writes one `--work` folder. Random choices are seeded, and
each step can be run again by itself.
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
