"""A model without weights, for what is not about models: it takes a fixed time a token, and dies when it is told to.

A document ``!kill``, ``!segfault``, ``!exit`` or ``!hang`` does that to the worker that meets it; with a path behind,
only the first time.
"""

import ctypes
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np

from mp_rerank.tokens import estimate_pair, estimate_text


def score_of(model: str, query: str, document: str) -> float:
    """The score ``model`` gives the pair: a hash, so that no two are likely to be alike."""
    return float(np.float32(zlib.crc32(f"{model}\0{query}\0{document}".encode()) / 2**32))


class FakeModel:
    """Scores by hash at so many seconds a token."""

    def __init__(self, name: str, seconds_per_token: float) -> None:
        self.name = name
        self.seconds_per_token = seconds_per_token

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        """The scores of ``pairs``, once all orders among them are obeyed."""
        for _, document in pairs:
            if document.startswith("!"):
                _obey(document)
        tokens = sum(estimate_pair(estimate_text(query), document, None) for query, document in pairs)
        time.sleep(tokens * self.seconds_per_token)
        return [score_of(self.name, query, document) for query, document in pairs]


def load(spec, device: str) -> FakeModel:
    """The loader; ``spec.name`` is ``NAME:SECONDS_PER_TOKEN``."""
    name, _, seconds = spec.name.partition(":")
    return FakeModel(name, float(seconds))


def _obey(order: str) -> None:
    verb, _, mark = order.partition(" ")
    if mark:
        if Path(mark).exists():
            return
        Path(mark).touch()
    if verb == "!kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "!segfault":
        ctypes.string_at(0)
    elif verb == "!exit":
        os._exit(3)
    elif verb == "!hang":
        while True:
            time.sleep(60)
