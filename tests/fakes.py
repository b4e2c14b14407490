"""Fake models, for tests and benchmarks: a worker can import them, and they need no torch.

``FakeModel`` scores by hash, and obeys: a document that starts with ``!`` is an order.

!raise TEXT        raise ValueError(TEXT)
!lose-device       raise what torch raises once a kernel has failed
!sys.exit          sys.exit(7)
!os._exit CODE     os._exit(CODE)
!segfault          read from address 0
!signal NAME       send this process the signal
!once PATH ORDER   obey ORDER if the file PATH is not there yet, and make it
!read PATH         wait until PATH, a FIFO, is opened for writing and closed; PATH.pid then holds this process's id
!note PATH         append a character to the file PATH
!hang              never return
!close-files       close every file this process has open
!eat               take more memory than there is
!say TEXT          log, warn and print TEXT
!in-result ORDER   obey ORDER when the score is turned into a number
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
import threading
import time
import warnings
import zlib
from array import array
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar

import numpy as np

from mp_rerank._pairs import CANARY, PLAIN, PairOptions, Readings, estimate_pair, estimate_text
from mp_rerank._recipe import Recipe
from mp_rerank._workers.child import import_engine

#: makes every model of a program the fake one, if the program begins with it; ``tests`` must be on its path
EVERY_MODEL = """
from mp_rerank.config import ModelSpec
defaults = list(ModelSpec.__init__.__defaults__)
ModelSpec.__init__.__defaults__ = (*defaults[:-1], "fakes:load")
assert ModelSpec().loader == "fakes:load"
"""
#: ``mp-rerank`` with the fake model in place of each: a real one's workers take five seconds to import
COMMAND = [sys.executable, "-c", f"{EVERY_MODEL}\nimport mp_rerank.cli\nraise SystemExit(mp_rerank.cli.main())"]


def score_of(query: str, document: str) -> float:
    """The fake's score of a pair: anywhere in [0, 1), the same everywhere, different for nearly all pairs."""
    return float(np.float32(zlib.crc32(f"{query}\0{document}".encode("utf-8", "surrogatepass")) / 2**32))


def scores_of(query: str, documents: list[str]) -> list[float]:
    return [score_of(query, document) for document in documents]


def obey(order: str) -> None:
    verb, _, rest = order.partition(" ")
    if verb == "!raise":
        raise ValueError(rest)
    if verb == "!lose-device":
        raise RuntimeError("CUDA error: device-side assert triggered")
    if verb == "!sys.exit":
        sys.exit(7)
    if verb == "!os._exit":
        os._exit(int(rest))
    if verb == "!segfault":
        ctypes.string_at(0)
    if verb == "!signal":
        os.kill(os.getpid(), getattr(signal, rest))
        time.sleep(60)  # the signal is on its way
    if verb == "!note":
        with Path(rest).open("a") as notes:
            notes.write(".")
    if verb == "!hang":
        while True:
            time.sleep(60)
    if verb == "!close-files":
        os.closerange(3, 1000)
    if verb == "!eat":
        bytearray(2**62)
    if verb == "!once":
        path, _, order = rest.partition(" ")
        try:
            Path(path).touch(exist_ok=False)  # one step: two workers at once must not both be the first
        except FileExistsError:
            return
        obey(order)
    if verb == "!read":
        Path(f"{rest}.pid").write_text(str(os.getpid()))
        Path(rest).read_bytes()
    if verb == "!say":
        logging.getLogger("fake.model").warning("logged %s", rest)
        warnings.warn(f"warned {rest}", stacklevel=1)
        print(f"printed {rest}")
        os.write(2, f"native {rest}\n".encode())


class Obeying:
    """Obeys when it is turned into a number, as a result is on its way back; unpickled, it has obeyed."""

    def __init__(self, order: str, score: float = 0.0) -> None:
        self.order = order
        self.score = score

    def __float__(self) -> float:
        obey(self.order)
        return self.score

    def __reduce__(self) -> tuple[object, ...]:
        return obey, (self.order,)


class FakeModel:
    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        scores: list[float] = []
        for query, document in pairs:
            score = score_of(self.salt + query, document)
            if document.startswith("!in-result "):
                scores.append(Obeying(document.removeprefix("!in-result "), score))  # type: ignore[arg-type]
                continue
            if document.startswith("!"):
                obey(document)
            scores.append(score)
        return scores


def load(spec: object, device: str) -> FakeModel:
    return FakeModel()


def load_salted(spec: object, device: str) -> FakeModel:
    """Another model: other scores."""
    return FakeModel("salted ")


def load_from_folder(spec: object, device: str) -> FakeModel:
    """Needs the file that makes ``spec.name`` a model's folder."""
    Path(spec.name, "config.json").read_text()  # type: ignore[attr-defined]
    return FakeModel()


class WithNan(FakeModel):
    """Scores ``!nan`` as not a number."""

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        scores = super().predict(pairs)
        return [math.nan if document == "!nan" else s for (_, document), s in zip(pairs, scores, strict=True)]


def load_with_nan(spec: object, device: str) -> WithNan:
    return WithNan()


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


def load_file(spec: object, device: str) -> FakeModel:
    """Scores as the content of the file ``spec.name`` says."""
    return FakeModel(Path(spec.name).read_text())  # type: ignore[attr-defined]


def load_miscounting(spec: object, device: str) -> object:
    class Miscounting:
        def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
            return [0.5] * (len(pairs) if len(pairs[0][1]) > 10 else 7)

    return Miscounting()


class Paced(FakeModel):
    """Takes its time: so many seconds a token."""

    def __init__(self, seconds_per_token: float, salt: str = "") -> None:
        super().__init__(salt)
        self.seconds_per_token = seconds_per_token

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        time.sleep(self.seconds_per_token * sum(estimate_pair(estimate_text(q), d, None) for q, d in pairs))
        return super().predict(pairs)


def load_paced(spec: object, device: str) -> Paced:
    """``spec.name`` is the seconds a token; with ``SALT:`` before them, another model for each salt."""
    salt, _, seconds = spec.name.rpartition(":")  # type: ignore[attr-defined]
    return Paced(float(seconds), salt)


class Counting(FakeModel):
    """Counts tokens, and finds a quarter of those that were estimated; says that this took it an eighth of a second."""

    tokenize_seconds = 0.125

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        lengths = [estimate_pair(estimate_text(query), document, None) for query, document in pairs]
        self.readings = Readings(array("i", [length // 4 for length in lengths]), bytearray(len(pairs)))
        return super().predict(pairs)


def load_counting(spec: object, device: str) -> Counting:
    return Counting()


class Reading(FakeModel):
    """Reads words for tokens, ``max_length`` of them with the query's, and follows every option about a pair.

    A chunk is a document's next words, of which those of the query leave so many.
    """

    takes = frozenset(PairOptions._fields)
    prompts: ClassVar = {"short": "be short: "}

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.readings: Readings | None = None

    def predict(self, pairs: list[tuple[str, str]], options: list[PairOptions] | None = None) -> list[float]:
        self.readings = Readings(array("i"), bytearray())
        scores = []
        for i, (query, document) in enumerate(pairs):
            how = PLAIN if options is None else options[i]
            query = (how.prompt or "") + query
            words = document.split()
            room = self.max_length - len(query.split())
            limit = min(room, how.max_tokens_per_doc or room)
            if how.long_documents == "chunk":
                parts = [words[j : j + limit] for j in range(0, len(words), limit)]
            elif len(words) > limit and how.truncation == "error":
                self.readings.too_long[i] = len(words), limit
                parts = [[]]
            else:
                parts = [words[-limit:] if how.truncation == "start" else words[:limit]]
            found = [*super().predict([(query, " ".join(part)) for part in parts])]
            scores.append(math.nan if i in self.readings.too_long else max(found))
            if len(parts) > 1:
                start = document.index(" ".join(parts[found.index(max(found))]))
                self.readings.passages[i] = start, start + len(" ".join(parts[found.index(max(found))]))
            self.readings.tokens.append(sum(len(part) + len(query.split()) for part in parts))
            self.readings.truncated.append(sum(map(len, parts)) < len(words))
        return scores


def load_reading(spec: object, device: str) -> Reading:
    return Reading(spec.max_length or 8)  # type: ignore[attr-defined]


class Deadly(FakeModel):
    """Loads, is proved, and dies of whatever it is then given."""

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        if pairs[0] != CANARY[0]:
            os._exit(9)
        return super().predict(pairs)


def load_deadly(spec: object, device: str) -> Deadly:
    return Deadly()


def load_after_gate(spec: object, device: str) -> FakeModel:
    """Waits at the gate ``spec.name``, and scores as another model does."""
    obey(spec.name)  # type: ignore[attr-defined]
    return FakeModel("salted ")


def load_dying_in_answer(spec: object, device: str) -> FakeModel:
    """The first one to score ``!`` dies with half of its answer written: ``spec.name`` is its mark."""
    return DyingInAnswer(Path(spec.name))  # type: ignore[attr-defined]


class DyingInAnswer(FakeModel):
    def __init__(self, mark: Path) -> None:
        super().__init__()
        self.mark = mark

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        if pairs[0] != CANARY[0] and not self.mark.exists():
            self.mark.touch()

            def send_half(connection: Connection, data: bytes, *args: object) -> None:
                os.write(connection.fileno(), bytes(data)[: len(data) // 2])
                os._exit(1)

            Connection._send = send_half  # type: ignore[attr-defined,method-assign]
        return super().predict(pairs)


class Empty:
    """Scores each pair 0: at once, after so many seconds a call, or once there is no file ``gate``."""

    def __init__(self, seconds: float = 0.0, gate: str = "") -> None:
        self.seconds = seconds
        self.gate = gate

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        while self.gate and os.path.exists(self.gate):
            time.sleep(0.001)
        if self.seconds:
            time.sleep(self.seconds)
        return [0.0] * len(pairs)


def load_empty(spec: object, device: str) -> Empty:
    return Empty()


def load_sleeping(spec: object, device: str) -> Empty:
    """``spec.name`` is the seconds a call."""
    return Empty(seconds=float(spec.name))  # type: ignore[attr-defined]


def load_gated(spec: object, device: str) -> Empty:
    """``spec.name`` is the path of a file: while it exists, nothing is scored."""
    return Empty(gate=spec.name)  # type: ignore[attr-defined]


def load_imports(spec: object, device: str) -> Empty:
    """Imports what a real model's worker imports, and loads no model."""
    import_engine()
    return Empty()


class Optimizable(FakeModel):
    """Notes in the file ``notes`` which recipe it was given; finds one that names its process.

    Whoever scores while there is a file ``.apart`` removes it, and scores otherwise.
    """

    def __init__(self, notes: Path) -> None:
        super().__init__()
        self.notes = notes

    def optimize(self, recipe: Recipe | None) -> Optimizable:
        with self.notes.open("a") as notes:
            print("none" if recipe is None else recipe.prepacked[0], file=notes)
        die = self.notes.with_suffix(".die")
        if recipe is None and die.exists():
            die.unlink()
            os._exit(9)
        self.recipe = recipe or Recipe(prepacked=(str(os.getpid()),))
        return self

    def facts(self) -> dict[str, object]:
        return {"dtype": "", "weights_bytes": 0, "mapped_bytes": 0, "max_length": None, "recipe": self.recipe}

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        apart = self.notes.with_suffix(".apart")
        if apart.exists():
            apart.unlink()
            return [score + 1.0 for score in super().predict(pairs)]
        return super().predict(pairs)


def load_optimizable(spec: object, device: str) -> Optimizable:
    """``spec.name`` is the path of the notes; the first to prove anything dies of it if there is a file ``.die``."""
    return Optimizable(Path(spec.name))  # type: ignore[attr-defined]


class AtHome(FakeModel):
    """Scores otherwise in a fork of the process that it was made in."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        return [score + (os.getpid() != self.home) for score in super().predict(pairs)]


def load_at_home(spec: object, device: str) -> AtHome:
    return AtHome()


def load_beside_a_thread(spec: object, device: str) -> FakeModel:
    """Leaves a thread behind."""
    threading.Thread(target=threading.Event().wait, name="left-behind", daemon=True).start()
    return FakeModel()


class Threaded(FakeModel):
    """Scores a pair as the number of threads it was told to compute with; 0 before it was told."""

    threads = 0

    def set_threads(self, threads: int) -> None:
        self.threads = threads

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        return super().predict(pairs) if tuple(pairs[0]) == CANARY[0] else [float(self.threads)] * len(pairs)


def load_threaded(spec: object, device: str) -> Threaded:
    return Threaded()


def load_as_from_a_hub(spec: object, device: str) -> FakeModel:
    """Leaves a thread behind where it is not told to ask no hub, and notes how often it was loaded."""
    obey(spec.name)  # type: ignore[attr-defined]
    return FakeModel() if os.environ.get("HF_HUB_OFFLINE") else load_beside_a_thread(spec, device)


class Allocating(FakeModel):
    """Scores the number of pages that the system has to clear for 32 MiB, used and freed in blocks as a batch does."""

    def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
        if pairs[0] == CANARY[0]:
            return super().predict(pairs)
        import resource  # not on Windows

        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [bytearray(4 << 20) for _ in range(8)]
        del blocks
        return [float(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)] * len(pairs)


def load_allocating(spec: object, device: str) -> Allocating:
    return Allocating()
