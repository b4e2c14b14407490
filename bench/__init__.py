"""Measurements of the package, and the making of its built-in model. Nothing here is imported by `mp_rerank`.

    speed/       commands that measure pairs a second, and seconds a request
    resources/   commands that measure a worker's memory, and the seconds it takes to start
    quality/     the command that measures nDCG@10, and the rankers that it compares with
    faults/      commands that kill workers, interrupt runs, or let threads share a model, and count what goes wrong
    builtin/     the steps that make the built-in model
    reports/     a report's tables, files and pictures; the commands that compare and gather reports
    inputs/      what is measured on: texts, models with random weights, fake models
    results/     the recorded reports

`python -m bench` lists the commands; `__main__.py` has the module of each.
"""

from pathlib import Path

#: the repository
ROOT = Path(__file__).resolve().parent.parent
