"""Models for tests: importable by a worker, no torch, and obedient. A document that starts with ``!`` is an order.

!raise TEXT        raise ValueError(TEXT)
!sys.exit          sys.exit(7)
!os._exit CODE     os._exit(CODE)
!signal NAME       send this process the signal
!once PATH ORDER   obey ORDER if the file PATH is not there yet, and make it
!read PATH         wait until PATH, a FIFO, is opened for writing and closed
!say TEXT          log, warn and print TEXT
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np


def score_of(query: str, document: str) -> float:
    """The fake's score of a pair: anywhere in [0, 1), the same everywhere, different for nearly all pairs."""
    return float(np.float32(zlib.crc32(f"{query}\0{document}".encode("utf-8", "surrogatepass")) / 2**32))


def scores_of(query: str, documents: list[str]) -> list[float]:
    return [score_of(query, document) for document in documents]


def obey(order: str) -> None:
    verb, _, rest = order.partition(" ")
    if verb == "!raise":
        raise ValueError(rest)
    if verb == "!sys.exit":
        sys.exit(7)
    if verb == "!os._exit":
        os._exit(int(rest))
    if verb == "!signal":
        os.kill(os.getpid(), getattr(signal, rest))
        time.sleep(60)  # the signal is on its way
    if verb == "!once":
        path, _, order = rest.partition(" ")
        if not Path(path).exists():
            Path(path).touch()
            obey(order)
    if verb == "!read":
        Path(rest).read_bytes()
    if verb == "!say":
        logging.getLogger("fake.model").warning("logged %s", rest)
        warnings.warn(f"warned {rest}", stacklevel=1)
        print(f"printed {rest}")
        os.write(2, f"native {rest}\n".encode())


class FakeModel:
    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        scores = []
        for query, document in pairs:
            if document.startswith("!"):
                obey(document)
            scores.append(score_of(self.salt + query, document))
        return scores


def load(spec: object, device: str) -> FakeModel:
    return FakeModel()


def load_salted(spec: object, device: str) -> FakeModel:
    """Another model: other scores."""
    return FakeModel("salted ")


class ThreeLabels:
    def predict(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        return np.array([[score_of(q, d), score_of(d, q), len(d)] for q, d in pairs], dtype=np.float32).reshape(-1, 3)


def load_three_labels(spec: object, device: str) -> ThreeLabels:
    return ThreeLabels()


def load_obeying(spec: object, device: str) -> FakeModel:
    """Obeys ``spec.name`` while loading."""
    obey(spec.name)  # type: ignore[attr-defined]
    return FakeModel()


def load_random(spec: object, device: str) -> FakeModel:
    """Every worker gets another model, as from a checkpoint without a trained head."""
    return FakeModel(os.urandom(8).hex())


def load_miscounting(spec: object, device: str) -> object:
    class Miscounting:
        def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
            return [0.5] * (len(pairs) if len(pairs[0][1]) > 10 else 7)

    return Miscounting()
