"""Models without weights, for what is not about models.

`load` makes one that takes a fixed time a token, and dies when it is told to: a document ``!kill``, ``!segfault``,
``!exit`` or ``!hang`` does that to the worker that meets it; with a path behind, only the first time. The other loaders
make models that do nothing: at once, after a sleep, behind a gate, or beside all that a real model's worker imports.
"""

import ctypes
import os
import signal
import time
import zlib
from pathlib import Path

import numpy as np

from mp_rerank.tokens import estimate_pair, estimate_text
from mp_rerank.worker import import_engine


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


class EmptyModel:
    """Zeros, after so many seconds a call, once there is no file ``gate``."""

    def __init__(self, seconds: float = 0.0, gate: str = "") -> None:
        self.seconds = seconds
        self.gate = gate

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        """A zero for each of ``pairs``."""
        while self.gate and os.path.exists(self.gate):
            time.sleep(0.001)
        if self.seconds:
            time.sleep(self.seconds)
        return [0.0] * len(pairs)


def load_empty(spec, device: str) -> EmptyModel:
    """A loader: nothing but the machinery around a model."""
    return EmptyModel()


def load_sleeping(spec, device: str) -> EmptyModel:
    """A loader; ``spec.name`` is the seconds a call."""
    return EmptyModel(seconds=float(spec.name))


def load_gated(spec, device: str) -> EmptyModel:
    """A loader; ``spec.name`` is the path of a file: while it exists, nothing is scored."""
    return EmptyModel(gate=spec.name)


def load_imports(spec, device: str) -> EmptyModel:
    """A loader: what a real model's worker imports, and no model."""
    import_engine()
    return EmptyModel()


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
