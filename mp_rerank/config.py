"""What the caller may ask for: the model (`ModelSpec`) and the pool around it (`PoolConfig`).

Both are frozen and checked as they are made, so that a mistake is a ``TypeError`` or ``ValueError`` naming the field,
in the thread that made it, and not a worker that dies. Every default of the package stands here.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

__all__ = ["BUILTIN", "ModelSpec", "PoolConfig"]

BUILTIN = "builtin"
BUILTIN_FOLDER = Path(__file__).parent / "builtin"

# What each backend computes in.
DTYPES = {
    "torch": ("auto", "float32", "float16", "bfloat16"),
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
ACTIVATIONS = {"sigmoid": "torch.nn.Sigmoid", "identity": "torch.nn.Identity"}
DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|(cuda|xpu|npu|hpu)(:\d+)?")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it: the arguments of ``CrossEncoder``, in a form a worker can be sent.

    Attributes:
        name: ``"builtin"``, a hub name, or the path of a local folder.
        revision: branch, tag or commit on the hub.
        max_length: tokens a pair is truncated to; ``None`` keeps the model's own.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"auto"`` (the checkpoint's), or ``None``: what
            ``CrossEncoder`` itself would choose. A dtype that is named is proved after loading. 16 bits are slow
            on a CPU that has no instructions for them, and its workers say so. ``"int8"`` is for the other backends,
            where ``None`` is float32.
        activation: applied to the logits: ``"sigmoid"``, ``"identity"`` or the dotted path of an importable class or
            function; ``None`` keeps the model's own.
        weights: ``"shared"``: what a CPU can use as the checkpoint's file has it stays in that file's pages, once in
            memory for all workers; the file must not be overwritten in place meanwhile (another may take its name).
            ``"private"``: every worker makes its own copy.
        prepack: let a worker lay its linear layers out anew where that is faster on its CPU, as it measures. The layers
            it does that with are then copies of its own; with ``False`` all weights can be shared.
        unpad: let the network compute on real tokens only, and its last layer only what the head reads, on a CPU, where
            it then scores the same.
        trust_remote_code: let the model's repository run its code in the workers.
        model_kwargs, tokenizer_kwargs, config_kwargs: handed to transformers by ``CrossEncoder``.
        backend: what computes the network: ``"torch"``, or on the CPU ``"onnx"`` (ONNX Runtime, float32 or int8) or
            ``"openvino"`` (float32, bfloat16 or int8). Each is an extra to be installed; the model is converted by each
            worker as it starts.
        compile: pass the network through ``torch.compile``. Needs a C++ compiler where the workers run, and makes each
            of them start later, by a minute or so.
        loader: something importable, as ``"package.module:name"`` or as the function itself, called in the worker as
            ``loader(spec, device)`` in place of ``CrossEncoder``. What it returns needs ``predict(pairs)``, giving
            scores of shape (n,) or (n, num_labels) for a list of n ``(query, document)`` tuples; a ``CrossEncoder`` is
            proved and batched as if it had been loaded here.

    Raises:
        TypeError, ValueError: naming the field and the value.
    """

    name: str = BUILTIN
    revision: str | None = None
    max_length: int | None = None
    dtype: str | None = None
    activation: str | None = None
    weights: Literal["shared", "private"] = "shared"
    prepack: bool = True
    unpad: bool = True
    trust_remote_code: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_kwargs: Mapping[str, Any] = field(default_factory=dict)
    config_kwargs: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "torch"
    compile: bool = False
    loader: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"model: a name, a path or a ModelSpec is needed, not {self.name!r}")
        _check_optional_count("max_length", self.max_length)
        if self.backend not in DTYPES:
            raise ValueError(f"backend: one of {', '.join(DTYPES)} is needed, not {self.backend!r}")
        if self.dtype is not None and self.dtype not in DTYPES[self.backend]:
            words = f"dtype: one of {', '.join(DTYPES[self.backend])} or None is needed"
            raise ValueError(f"{words} with backend={self.backend!r}, not {self.dtype!r}{_backends_with(self.dtype)}")
        _check_flag("compile", self.compile)
        if self.compile and self.backend != "torch":
            raise ValueError(f"compile: it is torch's own, and of no use with backend={self.backend!r}")
        for name in ("backend", "compile"):
            if self.loader is not None and getattr(self, name) not in ("torch", False):
                raise ValueError(f"{name}: with a loader, which decides itself what computes, it cannot be chosen here")
        if self.activation is not None:
            if not isinstance(self.activation, str):
                raise TypeError(
                    f"activation: 'sigmoid', 'identity' or a dotted path is needed, not {self.activation!r} "
                    "(workers are other processes: they import it by its path)"
                )
            path = ACTIVATIONS.get(self.activation, self.activation)
            if "." not in path:
                raise ValueError(
                    f"activation: 'sigmoid', 'identity' or a dotted path is needed, not {self.activation!r}"
                )
            object.__setattr__(self, "activation", path)
        if self.weights not in ("shared", "private"):
            raise ValueError(f"weights: 'shared' or 'private' is needed, not {self.weights!r}")
        _check_flag("prepack", self.prepack)
        _check_flag("unpad", self.unpad)
        if self.loader is not None:
            object.__setattr__(self, "loader", _importable(self.loader))
        for name in ("model_kwargs", "tokenizer_kwargs", "config_kwargs"):
            value = getattr(self, name)
            if not isinstance(value, Mapping):
                raise TypeError(f"{name}: a mapping is needed, not {value!r}")
            object.__setattr__(self, name, dict(value))
            try:
                pickle.dumps(value)
            except Exception as error:
                raise ValueError(f"{name}: it cannot be sent to a worker process: {error}") from error

    @property
    def path(self) -> str:
        """What to hand to ``CrossEncoder``: the built-in model's folder, or the name as it is."""
        return str(BUILTIN_FOLDER) if self.name == BUILTIN else self.name

    @property
    def local(self) -> bool:
        """Whether loading can ask no hub."""
        return self.loader is not None or Path(self.path).is_dir()

    @property
    def cpu_only(self) -> bool:
        """Whether only a CPU can compute it."""
        return self.backend != "torch"

    def check_devices(self, devices: Sequence[str]) -> None:
        """Raise ``ValueError`` for a device, other than ``"auto"``, that the backend does not compute on."""
        for device in devices:
            if self.cpu_only and device != "auto" and not device.startswith("cpu"):
                raise ValueError(f"devices: backend={self.backend!r} computes on the CPU only, not on {device!r}")

    def check_exists(self) -> None:
        """Raise ``ValueError`` for a local path that holds no model, before any worker is started for it."""
        if self.loader is not None:
            return
        path = Path(self.path)
        if path.is_dir():
            if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
                raise ValueError(f"model: {self.name!r} is a folder without a config.json: not a model")
        elif path.is_file():
            raise ValueError(f"model: {self.name!r} is a file; a model is a folder with a config.json")
        elif path.is_absolute() or self.name.startswith((".", "~")) or self.name.count("/") > 1:
            raise ValueError(f"model: there is no folder {self.name!r}")


@dataclass(frozen=True)
class PoolConfig:
    """How many workers, where, and what bounds them. ``RerankerPool`` takes each field as a keyword.

    Attributes:
        devices: ``"auto"`` (every GPU, else the CPU), a device such as ``"cpu"`` or ``"cuda:1"``, or a list of them,
            one worker each unless ``workers`` says more. ``"cuda"`` means every visible GPU.
        workers: workers in all; ``None``: one for each GPU, or as many as cores and memory allow on the CPU.
        threads_per_worker: compute threads of each; ``None`` shares the cores out.
        pin: keep each worker that computes on the CPU on one NUMA node, near its weights, where the machine has several
            nodes. Otherwise, and with ``False``, workers run wherever this process may.
        tuned: go by what ``mp-rerank tune`` measured with this model on this machine, as far as ``workers``,
            ``threads_per_worker`` and ``batch_tokens`` are not given. ``False``, or ``MP_RERANK_TUNED=0`` in the
            environment: do not.
        isolation: ``"process"``, or ``"thread"``: one model in this process, one prediction at a time.
        start_method: ``"spawn"``, or ``"forkserver"`` (not on Windows): workers are forked from a process that has done
            the imports. The first start takes about as long, a restart less than half, and workers share memory.
        batch_tokens: padded tokens of one forward pass; ``None``: as tuned, else 1,024 on a CPU (2,048 where 16
            bits are asked for), 16,384 elsewhere.
        slice_tokens: tokens of one slice, which is what a worker is sent at a time; ``None``: about one batch. Smaller
            is fairer.
        max_pending_pairs, max_pending_tokens: the bound on work admitted and unfinished.
        overload: at the bound, ``"block"`` until there is room (or the request's own timeout), ``"raise"``
            PoolOverloadedError, or a number of seconds to wait before raising it.
        coalesce: score equal pairs (the same query and document, to the letter) that are pending at once only once, for
            all requests that hold them, or for one that holds them twice. They share what becomes of it: the score, or
            the error of a document that cannot be scored. What becomes of one of the requests is nothing to the others.
        score_cache: how many scores to keep after that, of the pairs asked for last; 0: none. They are the model's: a
            reload begins with none. About 250 bytes each, whatever the length of the texts (see ``pairs.digests``).
        max_attempts: workers that may die on one document before its request gets WorkerCrashedError.
        max_restarts: deaths in a row, with nothing scored between, after which a seat is given up.
        restart_backoff: seconds before the second restart in a row (the first is at once), doubling up to 30.
        start_timeout: seconds a worker may take to import and load; ``None``: no limit.
        hang_timeout: seconds a slice may take beyond ten times what the worker's measured speed promises before the
            worker is killed; ``None``: no limit. Threads cannot be killed: no effect under ``isolation="thread"``.
        max_slices_per_worker: replace a worker after so many slices; ``None``: never.
        max_memory_per_worker: replace a worker when its resident memory passes so many bytes; ``None``: never.

    Raises:
        TypeError, ValueError: naming the field and the value.
    """

    devices: str | Sequence[str] = "auto"
    workers: int | None = None
    threads_per_worker: int | None = None
    pin: bool = True
    tuned: bool = True
    isolation: Literal["process", "thread"] = "process"
    start_method: Literal["spawn", "forkserver"] = "spawn"
    batch_tokens: int | None = None
    slice_tokens: int | None = None
    max_pending_pairs: int = 1_000_000
    max_pending_tokens: int = 200_000_000
    overload: Literal["block", "raise"] | float = "block"
    coalesce: bool = True
    score_cache: int = 0
    max_attempts: int = 3
    max_restarts: int = 5
    restart_backoff: float = 0.5
    start_timeout: float | None = 600.0
    hang_timeout: float | None = 300.0
    max_slices_per_worker: int | None = None
    max_memory_per_worker: int | None = None

    def __post_init__(self) -> None:
        devices = [self.devices] if isinstance(self.devices, str) else list(self.devices)
        if not devices:
            raise ValueError("devices: at least one device is needed")
        for device in devices:
            if not isinstance(device, str) or not DEVICE.fullmatch(device):
                raise ValueError(
                    f"devices: unknown device {device!r}; 'auto', 'cpu', 'cuda', 'cuda:0', 'mps', … are known"
                )
        object.__setattr__(self, "devices", tuple(devices))
        for name in ("workers", "threads_per_worker", "batch_tokens", "slice_tokens", "max_slices_per_worker"):
            _check_optional_count(name, getattr(self, name))
        _check_optional_count("max_memory_per_worker", self.max_memory_per_worker)
        for name in ("max_pending_pairs", "max_pending_tokens", "max_attempts"):
            _check_count(name, getattr(self, name))
        for name in ("pin", "tuned", "coalesce"):
            _check_flag(name, getattr(self, name))
        if not isinstance(self.score_cache, int) or isinstance(self.score_cache, bool):
            raise TypeError(f"score_cache: a whole number is needed, not {self.score_cache!r}")
        if self.score_cache < 0:
            raise ValueError(f"score_cache: at least 0 is needed, not {self.score_cache}")
        if self.isolation not in ("process", "thread"):
            raise ValueError(f"isolation: 'process' or 'thread' is needed, not {self.isolation!r}")
        if self.start_method not in ("spawn", "forkserver"):
            raise ValueError(f"start_method: 'spawn' or 'forkserver' is needed, not {self.start_method!r}")
        if self.start_method not in multiprocessing.get_all_start_methods():
            raise ValueError(f"start_method: this system has no {self.start_method!r}")
        if self.isolation == "thread" and self.workers not in (None, 1):
            raise ValueError(f"workers: isolation='thread' is one model and one worker, not {self.workers}")
        if isinstance(self.overload, str):
            if self.overload not in ("block", "raise"):
                raise ValueError(f"overload: 'block', 'raise' or seconds are needed, not {self.overload!r}")
        else:
            _check_seconds("overload", self.overload)
        if not isinstance(self.max_restarts, int) or self.max_restarts < 0:
            raise ValueError(f"max_restarts: a whole number of at least 0 is needed, not {self.max_restarts!r}")
        _check_seconds("restart_backoff", self.restart_backoff)
        for name in ("start_timeout", "hang_timeout"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name))

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PoolConfig:
        """The configuration for keyword arguments of ``RerankerPool``; an unknown one is a ``TypeError``."""
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise TypeError(f"RerankerPool has no option {', '.join(unknown)}; it has {', '.join(known)}")
        return replace(cls(), **options)


def _backends_with(dtype: object) -> str:
    found = [f"backend={backend!r}" for backend, dtypes in DTYPES.items() if dtype in dtypes]
    return f" (that is for {' and '.join(found)})" if found else ""


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: a whole number is needed, not {value!r}")
    if value < 1:
        raise ValueError(f"{name}: at least 1 is needed, not {value}")


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False is needed, not {value!r}")


def _check_optional_count(name: str, value: object) -> None:
    if value is not None:
        _check_count(name, value)


def _check_seconds(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: seconds are needed, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{name}: at least 0 seconds are needed, not {value}")


def _importable(loader: str | Callable[..., Any]) -> str:
    """``loader`` as ``"module:name"``, once it is sure that a process which never saw the caller's main can import."""
    if isinstance(loader, str):
        module, colon, name = loader.partition(":")
        if not (module and colon and name):
            raise ValueError(f"loader: 'package.module:name' is needed, not {loader!r}")
    elif callable(loader):
        module, name = getattr(loader, "__module__", None) or "", getattr(loader, "__qualname__", "")
    else:
        raise TypeError(f"loader: a function or 'package.module:name' is needed, not {loader!r}")
    if module == "__main__":
        raise ValueError(
            f"loader: {name} lives in the main module, which workers do not run; move it into a module they can import"
        )
    found: Any = sys.modules.get(module)
    try:
        if found is None:  # not to be imported here: it may import torch
            if importlib.util.find_spec(module) is None:
                raise ModuleNotFoundError(f"No module named {module!r}")
            return f"{module}:{name}"
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ValueError(f"loader: {module}:{name} cannot be imported by a worker: {error}") from error
    if not callable(found) or (not isinstance(loader, str) and found is not loader):
        raise ValueError(f"loader: {module}:{name} is not the function that was given; workers import it by its name")
    return f"{module}:{name}"
