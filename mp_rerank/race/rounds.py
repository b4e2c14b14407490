"""What all parts of a race share: the requests, threads that start at the same moment, and the result of a round."""

from __future__ import annotations

import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

import numpy as np
import psutil

__all__ = [
    "HUNG",
    "MODELS",
    "PATIENCE",
    "REFERENCE",
    "TIED",
    "Pairs",
    "Reference",
    "Round",
    "key_of",
    "kill_tree",
    "kind_of",
    "only_json",
    "requests",
    "together",
]

# Seconds after which a thread counts as hung: many times the duration of the slowest case on a busy machine.
PATIENCE = 180.0
MODELS = ("one", "other")
TIED = "tied"
REFERENCE = "reference.json"
DOCUMENTS = 24
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}

Pairs = list[tuple[str, str]]
Reference = dict[str, list[list[float]]]  # key_of(...) -> the expected scores of each request


class _Hung:
    def __repr__(self) -> str:
        return "HUNG"


HUNG = _Hung()


def key_of(name: str, dtype: str | None = None, *, logits: bool = False) -> str:
    """The key of a reference's scores, of that model in that dtype."""
    return f"{name} {dtype or 'float32'}" + (" logits" if logits else "")


class Round:
    """What went wrong in one round of a case."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tries = self.wrong_dtypes = self.wrong_scores = self.hangs = 0
        self.errors: Counter[str] = Counter()
        self.poison: list[str] = []
        self.altered: list[str] = []

    def take(self, outcomes: Sequence[Any]) -> list[Any]:
        """Count the errors and hangs among ``outcomes``; returns the outcomes with None in place of those."""
        self.tries += len(outcomes)
        self.hangs += sum(outcome is HUNG for outcome in outcomes)
        self.errors.update(kind_of(outcome) for outcome in outcomes if isinstance(outcome, Exception))
        return [None if outcome is HUNG or isinstance(outcome, Exception) else outcome for outcome in outcomes]

    def check_scores(self, scores: Any, number: int, key: str) -> None:
        """Count the scores of request ``number`` if they differ from the scores of a model that was used alone."""
        self.wrong_scores += not self.as_expected(scores, number, key)

    def as_expected(self, scores: Any, number: int, key: str) -> bool:
        expected = np.asarray(self.reference[key][number])
        found = np.asarray(scores)
        return found.shape == expected.shape and bool(np.abs(found - expected).max() <= TOLERANCE[key.split()[1]])

    def as_json(self) -> dict[str, Any]:
        return {
            "tries": self.tries,
            "errors": dict(self.errors),
            "wrong_dtypes": self.wrong_dtypes,
            "wrong_scores": self.wrong_scores,
            "hangs": self.hangs,
            "poison": self.poison,
            "altered": self.altered,
        }


def together(works: Sequence[Callable[[], Any]], patience: float = PATIENCE) -> list[Any]:
    """Call each of ``works`` in a thread, all at the same moment; returns results, exceptions, or ``HUNG``."""
    outcomes: list[Any] = [HUNG] * len(works)
    barrier = threading.Barrier(len(works))

    def run(number: int) -> None:
        barrier.wait()
        try:
            outcomes[number] = works[number]()
        except Exception as error:
            outcomes[number] = error

    threads = [threading.Thread(target=run, args=(i,), name=f"agent {i}", daemon=True) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(patience)
        if thread.is_alive():
            patience = 0.0
    return list(outcomes)


def kind_of(error: BaseException) -> str:
    """An exception's type and the first line of its message, without numbers, so that equal ones can be counted."""
    lines = re.sub(r"\b\d+\b", "N", str(error)).strip().splitlines()
    words = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return words if len(words) <= 100 else words[:99] + "…"


def requests(threads: int) -> list[Pairs]:
    """A request for each thread: a query of its own, and documents of 1 to 39 words."""
    chance = random.Random(0)

    def text() -> str:
        return " ".join(f"word{chance.randrange(200)}" for _ in range(chance.randrange(1, 40)))

    return [[(query, text()) for _ in range(DOCUMENTS)] for query in (text() for _ in range(threads))]


def kill_tree(pid: int) -> None:
    """End a process and all that it started, those first."""
    try:
        tree = psutil.Process(pid)
        for process in (*tree.children(recursive=True), tree):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
    except psutil.NoSuchProcess:
        pass


@contextmanager
def only_json() -> Iterator[TextIO]:
    """The standard output, for JSON alone: all other prints go to standard error meanwhile."""
    own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    with own:
        yield own
