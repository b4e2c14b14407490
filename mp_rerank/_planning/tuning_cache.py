"""What ``mp-rerank tune`` measured, kept for later pools: one small file for each model and machine.

An answer holds only for what it was measured with: the model and its weights, the devices, the part of the machine that
this process may use, and the versions of torch and of this package. The file's name is made of all these.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mp_rerank._planning.checkpoint import weight_files
from mp_rerank._planning.machine import Machine
from mp_rerank._text import one_line
from mp_rerank.config import BUILTIN, ModelSpec

__all__ = ["SWITCH", "Tuned", "keep", "look_up"]

logger = logging.getLogger(__name__)

# Set to 0 in the environment: no pool uses what was tuned.
SWITCH = "MP_RERANK_TUNED"


@dataclass(frozen=True)
class Tuned:
    """The fastest setup that was found.

    Attributes:
        workers, threads, batch_tokens: as in ``PoolConfig``; ``threads`` are each worker's.
        pairs_per_second: its speed on the texts it was measured with.
        times_the_default: its speed as a multiple of the default plan's; 1 if nothing was faster.
        measured_on: the day, as ``2026-01-31``.
    """

    workers: int
    threads: int
    batch_tokens: int
    pairs_per_second: float
    times_the_default: float
    measured_on: str


def look_up(spec: ModelSpec, devices: Sequence[str], machine: Machine) -> Tuned | None:
    """The answer for ``spec`` on ``devices`` of ``machine``, if there is one. Never raises."""
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        path, _ = _place(spec, devices, machine)
        if not path.exists():
            return None
        answer = Tuned(**json.loads(path.read_text(encoding="utf-8"))["answer"])
        for name in ("workers", "threads", "batch_tokens"):
            value = getattr(answer, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} is {value!r}")
        return dataclasses.replace(
            answer,
            pairs_per_second=float(answer.pairs_per_second),
            times_the_default=float(answer.times_the_default),
            measured_on=str(answer.measured_on),
        )
    except Exception as error:  # a pool can do without it, whatever is wrong with the file
        logger.debug("what was tuned cannot be read: %s", one_line(repr(error)))
        return None


def keep(answer: Tuned, spec: ModelSpec, devices: Sequence[str], machine: Machine) -> Path:
    """Keep ``answer`` for ``look_up``, in place of an older one; the file that holds it.

    Raises:
        OSError: it cannot be written, or there is no home folder to write it to.
    """
    path, key = _place(spec, devices, machine)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"answer": dataclasses.asdict(answer), "for": key}, indent=2), encoding="utf-8")
    unfinished.replace(path)  # a reader finds the old one or the new one, whole
    return path


def _place(spec: ModelSpec, devices: Sequence[str], machine: Machine) -> tuple[Path, dict[str, Any]]:
    """The file for the answer, and everything the answer depends on, which the file is named after."""
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("mp_rerank", appauthor=False)
    except RuntimeError:  # later platformdirs; earlier ones leave the "~" in the path
        folder = Path("~")
    if not folder.is_absolute():
        raise FileNotFoundError("this user has no home folder; set XDG_CACHE_HOME")
    model = dataclasses.asdict(spec)
    if spec.loader is None and spec.name != BUILTIN and spec.local:
        model["name"] = os.path.realpath(spec.path)
    key = {
        "model": model,
        "weights": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(spec)],
        "devices": list(devices),
        "cpu": machine.cpu_model,
        "cpus": [machine.logical, machine.affinity, machine.physical, machine.quota, len(machine.nodes)],
        "memory_gib": round(machine.memory_total / 2**30),
        "gpus": list(machine.gpus),
        "versions": {name: _version(name) for name in ("mp-rerank", "torch")},
    }
    text = json.dumps(key, sort_keys=True, default=repr)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return folder / "tuned" / f"{name}.json", json.loads(text)


def _version(package: str) -> str | None:
    if package == "mp-rerank":  # which need not be installed
        from mp_rerank import __version__

        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None
