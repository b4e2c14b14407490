"""What the caller may ask for: the model (`ModelSpec`) and the pool around it (`PoolConfig`).

Both are frozen, and checked when they are made. So a mistake is a ``TypeError`` or ``ValueError`` that names the field,
in the caller's thread, and not a worker that dies. Every default of the package stands here.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import re
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from mp_rerank._checks import check_count, check_flag, check_optional_count, check_seconds, check_text, is_for_ever
from mp_rerank._text import one_line

__all__ = ["BUILTIN", "START_METHODS", "ClusterAddress", "ModelSpec", "PoolConfig"]

BUILTIN = "builtin"
# More than any machine has cores; a larger number is a slip.
MAX_WORKERS = 10_000
BUILTIN_FOLDER = Path(__file__).parent / "builtin"

# What each backend computes in.
DTYPES = {
    "torch": ("auto", "float32", "float16", "bfloat16"),
    "onnx": ("float32", "int8"),
    "openvino": ("float32", "bfloat16", "int8"),
}
START_METHODS = ("spawn", "forkserver", "fork-model")
ACTIVATIONS = {"sigmoid": "torch.nn.Sigmoid", "identity": "torch.nn.Identity"}
DEVICE = re.compile(r"auto|(cpu|mps)(:0)?|(cuda|xpu|npu|hpu)(:\d+)?")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it: the arguments of ``CrossEncoder``, in a form that can be sent to a worker.

    Attributes:
        name: ``"builtin"``, a hub name, or the path of a local folder (a ``Path`` will do). A folder's path is made
            absolute at once, so that it means the same wherever the process goes later.
        revision: branch, tag or commit on the hub.
        max_length: tokens a pair is truncated to; ``None`` keeps the model's own.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"``, ``"auto"`` (the checkpoint's), or ``None``: what
            ``CrossEncoder`` itself would choose. A dtype that is named is checked after loading. A CPU without
            instructions for 16 bits is slow in them, and its workers log that. ``"int8"`` is for the other backends,
            whose ``None`` is float32.
        activation: applied to the logits: ``"sigmoid"``, ``"identity"`` or the dotted path of an importable class or
            function; ``None`` keeps the model's own.
        weights: ``"shared"``: workers on the CPU use the pages of the checkpoint's file, once in memory for all of
            them, for all weights that the file has in the form they are needed in. Do not overwrite that file in place
            meanwhile (a new file may take its name). ``"private"``: every worker makes its own copy.
        prepack: let each worker on the CPU store its linear layers in another layout, where it measures that this is
            faster. Those layers are then the worker's own copies. With ``False`` all weights can be shared.
        unpad: on a CPU, let the network compute on real tokens only: a decoder on what pairs begin with alike once,
            the last layer on what the head reads. A model whose scores this would change is left as it is.
        trust_remote_code: let the model's repository run its code in the workers.
        model_kwargs, tokenizer_kwargs, config_kwargs: passed to transformers by ``CrossEncoder``.
        backend: what computes the network: ``"torch"``, or on the CPU ``"onnx"`` (ONNX Runtime, float32 or int8) or
            ``"openvino"`` (float32, bfloat16 or int8). The last two are extras to install. Each worker converts the
            model when it starts.
        loader: an importable function, as ``"package.module:name"`` or as the function itself. Each worker calls it as
            ``loader(spec, device)`` in place of ``CrossEncoder``. What it returns needs a method ``predict(pairs)``: of
            a list of n ``(query, document)`` tuples it returns scores of shape (n,) or (n, num_labels). A
            ``CrossEncoder`` is proved and batched as if the pool had loaded it.

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
    loader: str | Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        name: object = os.fspath(self.name) if isinstance(self.name, os.PathLike) else self.name
        if not isinstance(name, str) or not name:
            raise TypeError(f"model: a name, a path or a ModelSpec is needed, not {name!r}")
        name = str.__str__(name)  # of numpy's, say: as it is printed, compared and sent to workers
        if name != BUILTIN:
            name = _local_folder(name) or name
        object.__setattr__(self, "name", name)
        if self.revision is not None:
            check_text("revision", self.revision)
        object.__setattr__(self, "max_length", check_optional_count("max_length", self.max_length))
        for flag in ("prepack", "unpad", "trust_remote_code"):
            check_flag(flag, getattr(self, flag))
        self._check_backend()
        if self.activation is not None:
            object.__setattr__(self, "activation", _check_dotted(self.activation))
        if self.weights not in ("shared", "private"):
            raise ValueError(f"weights: 'shared' or 'private' is needed, not {self.weights!r}")
        if self.loader is not None:
            object.__setattr__(self, "loader", _importable(self.loader))
        for field_name in ("model_kwargs", "tokenizer_kwargs", "config_kwargs"):
            object.__setattr__(self, field_name, self._checked_kwargs(field_name))

    def _check_backend(self) -> None:
        """Check ``backend``, and what depends on it: ``dtype`` and ``loader``."""
        if not isinstance(self.backend, str) or self.backend not in DTYPES:
            raise ValueError(f"backend: one of {', '.join(DTYPES)} is needed, not {self.backend!r}")
        if self.dtype is not None and self.dtype not in DTYPES[self.backend]:
            words = f"dtype: one of {', '.join(DTYPES[self.backend])} or None is needed"
            raise ValueError(f"{words} with backend={self.backend!r}, not {self.dtype!r}{_backends_with(self.dtype)}")
        if self.loader is not None and self.backend != "torch":
            raise ValueError("backend: with a loader, which decides itself what computes, it cannot be chosen here")

    def _checked_kwargs(self, name: str) -> dict[str, Any]:
        """The field ``name`` as a dict that can be sent to a worker."""
        value = getattr(self, name)
        if not isinstance(value, Mapping):
            raise TypeError(f"{name}: a mapping is needed, not {value!r}")
        if "trust_remote_code" in value:  # it would run code just as the field of that name does
            check_flag(f"{name}['trust_remote_code']", value["trust_remote_code"])
        try:
            pickle.dumps(value)
        except Exception as error:
            raise ValueError(f"{name}: it cannot be sent to a worker process: {one_line(error)}") from error
        return dict(value)

    @property
    def path(self) -> str:
        """What to hand to ``CrossEncoder``: the built-in model's folder, or the name as it is."""
        return str(BUILTIN_FOLDER) if self.name == BUILTIN else self.name

    @property
    def local(self) -> bool:
        """Whether loading can ask no hub."""
        return self.loader is not None or os.path.isabs(self.path)

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
        path = self.path
        if os.path.isdir(path):
            if not any(os.path.isfile(os.path.join(path, name)) for name in ("config.json", "modules.json")):
                raise ValueError(f"model: {self.name!r} is a folder without a config.json: not a model")
        elif os.path.isfile(path):
            raise ValueError(f"model: {self.name!r} is a file; a model is a folder with a config.json")
        elif os.path.isabs(path) or self.name.startswith((".", "~")) or self.name.count("/") > 1:
            raise ValueError(f"model: there is no folder {self.name!r}")


@dataclass(frozen=True)
class ClusterAddress:
    """Where a Dask scheduler is, and how to speak to it.

    Attributes:
        address: such as ``"tcp://10.0.0.1:8786"``.
        security: Dask's ``Security``, for TLS; ``None``: as Dask's own configuration says.
    """

    address: str
    security: Any = field(default=None, repr=False)


@dataclass(frozen=True)
class PoolConfig:
    """How many workers, on which devices, with which limits. ``RerankerPool`` takes each field as a keyword.

    Attributes:
        devices: ``"auto"`` or ``None`` (every GPU, else the CPU), a device such as ``"cpu"`` or ``"cuda:1"``, or a list
            of them, with one worker each unless ``workers`` is given; a GPU gets up to four with a small model, whose
            texts take longer to tokenize than to score. ``"cuda"`` means every visible GPU.
        workers: workers in all; ``None``: one for each GPU, or as many as cores and memory allow on the CPU.
        threads_per_worker: compute threads of each worker; ``None``: the cores, shared among the workers.
        pin: on a machine of several NUMA nodes, keep each worker that computes on the CPU on one node, near its
            weights. With ``False`` workers run wherever this process may.
        tuned: use what ``mp-rerank tune`` measured with this model on this machine, for those of ``workers``,
            ``threads_per_worker`` and ``batch_tokens`` that are not given. ``False``, or ``MP_RERANK_TUNED=0`` in the
            environment, turns that off.
        isolation: ``"process"``, or ``"thread"``: one model in this process, one prediction at a time.
        start_method: ``"spawn"``; ``"forkserver"`` (not on Windows): workers are forked from a process that has done
            the imports, a restart takes less than half as long, and workers share that memory; or ``"fork-model"``
            (Linux, CPU, torch): workers are forked from a process that has loaded and proved the model, a restart takes
            a fraction of a second, and a worker's own memory is little.
        batch_tokens: padded tokens of one forward pass; ``None``: as tuned, else 1,024 on a CPU (2,048 with a 16-bit
            dtype), 16,384 elsewhere.
        slice_tokens: tokens of one slice, which is what a worker is given at a time; ``None``: about one batch. Smaller
            slices are fairer.
        max_pending_pairs, max_pending_tokens: the bound on pending work.
        max_pending_pairs_per_caller: the bound on the pending pairs of each caller; ``None``: only the pool's. A caller
            at this bound waits, or is refused, as ``overload`` says, and holds up no other caller.
        overload: what ``submit`` does at the bound: ``"block"``: wait for room, or for the request's own timeout;
            ``"raise"`` PoolOverloadedError; or a number of seconds to wait before raising it.
        coalesce: score equal pairs (the same query and document, to the letter) that are pending at the same time only
            once, for all requests that hold them. They share the score, or the error of a document that cannot be
            scored. A request that is cancelled or expires does not affect the others.
        score_cache: how many scores to keep, of the pairs asked for last; 0: none. A reload begins with none. Each
            takes about 350 bytes, whatever the length of the texts.
        nan_scores: what becomes of a document whose score is nan or infinite: ``"error"``: its request gets
            ScoringError, naming it; ``"none"``: it ranks last, with a ``relevance_score`` of ``None`` (nan where the
            result is an array).
        max_attempts: workers that may die of one document before its request gets WorkerCrashedError.
        max_restarts: deaths in a row, with nothing scored between, after which a seat is given up.
        restart_backoff: seconds before the second restart in a row (the first is at once), doubling up to 30.
        start_timeout: seconds a worker may take to import and load; ``None``: no limit.
        hang_timeout: a worker is killed when its slice takes so many seconds longer than ten times what the worker's
            measured speed promises; ``None``: never. No effect under ``isolation="thread"``: threads cannot be killed.
        max_slices_per_worker: replace a worker after so many slices; ``None``: never.
        max_memory_per_worker: replace a worker when its resident memory passes so many bytes; ``None``: never. No
            effect on workers of a Dask cluster, which has a limit of its own.
        cluster: a Dask cluster, each of whose worker processes is a seat of the pool: the address of its scheduler, or
            a Dask ``Client`` or cluster object, of which address and security are taken. Workers may join and leave
            while the pool lives. Seats on this machine are beside them only if ``workers`` is given. Needs the extra
            ``dask``.
        cluster_timeout: seconds that the cluster's scheduler, or one of its workers, may be silent or away.
        min_workers: start with so many workers (at least one, to prove the model), and a further one, up to
            ``workers``, while more work waits than the others have been given; ``None``: start all, unless
            ``idle_timeout`` is given: then 1.
        idle_timeout: retire a worker that has had nothing to do for so many seconds, as long as ``min_workers`` are
            left; its seat rests until there is work for it. ``None``: never.

    Raises:
        TypeError, ValueError: naming the field and the value.
    """

    devices: str | Sequence[str] = "auto"
    workers: int | None = None
    threads_per_worker: int | None = None
    pin: bool = True
    tuned: bool = True
    isolation: Literal["process", "thread"] = "process"
    start_method: Literal["spawn", "forkserver", "fork-model"] = "spawn"
    batch_tokens: int | None = None
    slice_tokens: int | None = None
    max_pending_pairs: int = 1_000_000
    max_pending_tokens: int = 200_000_000
    max_pending_pairs_per_caller: int | None = None
    overload: Literal["block", "raise"] | float = "block"
    coalesce: bool = True
    score_cache: int = 0
    nan_scores: Literal["error", "none"] = "error"
    max_attempts: int = 3
    max_restarts: int = 5
    restart_backoff: float = 0.5
    start_timeout: float | None = 600.0
    hang_timeout: float | None = 300.0
    max_slices_per_worker: int | None = None
    max_memory_per_worker: int | None = None
    cluster: Any = None
    cluster_timeout: float = 30.0
    min_workers: int | None = None
    idle_timeout: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", _devices(self.devices))
        checked: dict[str, Any] = {}
        for name in ("workers", "threads_per_worker", "batch_tokens", "slice_tokens", "max_slices_per_worker"):
            checked[name] = check_optional_count(name, getattr(self, name))
        for name in ("max_memory_per_worker", "max_pending_pairs_per_caller"):
            checked[name] = check_optional_count(name, getattr(self, name))
        for name in ("max_pending_pairs", "max_pending_tokens", "max_attempts"):
            checked[name] = check_count(name, getattr(self, name))
        for name in ("max_restarts", "score_cache"):
            checked[name] = check_count(name, getattr(self, name), least=0)
        if self.min_workers is not None:
            checked["min_workers"] = check_count("min_workers", self.min_workers, least=0)
        for name, number in checked.items():
            object.__setattr__(self, name, number)
        if self.workers is not None and self.workers > MAX_WORKERS:
            raise ValueError(f"workers: at most {MAX_WORKERS} are started, not {self.workers}")
        if self.min_workers is not None and self.workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers: at most workers ({self.workers}) are needed, not {self.min_workers}")
        for name in ("pin", "tuned", "coalesce"):
            check_flag(name, getattr(self, name))
        if self.nan_scores not in ("error", "none"):
            raise ValueError(f"nan_scores: 'error' or 'none' is needed, not {self.nan_scores!r}")
        self._check_kind_of_worker()
        self._check_seconds()
        object.__setattr__(self, "cluster", _cluster_address(self.cluster))

    def _check_kind_of_worker(self) -> None:
        """Check ``isolation`` and ``start_method``."""
        if self.isolation not in ("process", "thread"):
            raise ValueError(f"isolation: 'process' or 'thread' is needed, not {self.isolation!r}")
        if self.start_method not in START_METHODS:
            words = "'spawn', 'forkserver' or 'fork-model' is needed"
            raise ValueError(f"start_method: {words}, not {self.start_method!r}")
        if self.start_method == "fork-model":
            self._check_fork_model()
        elif self.start_method not in multiprocessing.get_all_start_methods():
            raise ValueError(f"start_method: this system has no {self.start_method!r}")
        if self.isolation == "thread" and self.workers not in (None, 1):
            raise ValueError(f"workers: isolation='thread' is one model and one worker, not {self.workers}")

    def check_model(self, spec: ModelSpec) -> None:
        """Raise ``ValueError`` where the devices or workers asked for cannot be ``spec``'s."""
        spec.check_devices(self.devices)
        if self.start_method == "fork-model" and spec.backend != "torch":
            raise ValueError(
                f"start_method: 'fork-model' is for torch, not for backend={spec.backend!r}, whose threads no fork has"
            )

    def _check_fork_model(self) -> None:
        words = "start_method: 'fork-model'"
        if self.isolation == "thread":
            raise ValueError(f"{words} is of no use with isolation='thread', which has no process to fork")
        others = [device for device in self.devices if device not in ("auto", "cpu", "cpu:0")]
        if others:
            raise ValueError(f"{words} works on the CPU only (devices='cpu'), not on {', '.join(others)}")
        try:
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError):
            raise ValueError(f"{words} needs Linux 5.3 or newer: this system has no pidfd_open") from None

    def _check_seconds(self) -> None:
        """Check all times. One beyond any clock means the same as no limit."""
        if isinstance(self.overload, str):
            if self.overload not in ("block", "raise"):
                raise ValueError(f"overload: 'block', 'raise' or seconds are needed, not {self.overload!r}")
        else:
            wait = check_seconds("overload", self.overload)
            object.__setattr__(self, "overload", "block" if is_for_ever(wait) else wait)
        for name in ("start_timeout", "hang_timeout", "idle_timeout"):
            if getattr(self, name) is not None:
                limit = check_seconds(name, getattr(self, name))
                object.__setattr__(self, name, None if is_for_ever(limit) else limit)
        wait = check_seconds("cluster_timeout", self.cluster_timeout)
        if not wait:
            raise ValueError("cluster_timeout: more than 0 seconds are needed, not 0")
        object.__setattr__(self, "cluster_timeout", min(wait, threading.TIMEOUT_MAX))
        backoff = check_seconds("restart_backoff", self.restart_backoff)
        object.__setattr__(self, "restart_backoff", min(backoff, threading.TIMEOUT_MAX))

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


def _local_folder(name: str) -> str | None:
    """The absolute path of ``name``, if it is a folder; ``None``: it is no folder.

    Links are kept, and followed whenever the model is loaded.
    """
    path = os.path.expanduser(name) if name.startswith("~") else name
    if not os.path.isdir(path):
        return None
    try:
        # What ".." means depends on the links before it, so it is not simply cut out.
        return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)
    except OSError as error:
        raise ValueError(f"model: {name!r} is relative to a working directory that does not exist any more") from error


def _check_dotted(activation: object) -> str:
    """``activation`` as a dotted path."""
    words = f"activation: 'sigmoid', 'identity' or a dotted path is needed, not {activation!r}"
    if not isinstance(activation, str):
        raise TypeError(f"{words} (workers are other processes: they import it by its path)")
    path = ACTIVATIONS.get(activation, activation)
    if "." not in path or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(words)
    return path


def _devices(devices: object) -> tuple[str, ...]:
    """``devices`` as a tuple of names."""
    if devices is None:
        return ("auto",)
    if not isinstance(devices, (str, Iterable)) or isinstance(devices, (bytes, Mapping)):
        raise TypeError(f"devices: a device or a list of devices is needed, not {devices!r}")
    named = [devices] if isinstance(devices, str) else list(devices)
    if not named:
        raise ValueError("devices: at least one device is needed")
    for device in named:
        if not isinstance(device, str) or not DEVICE.fullmatch(device):
            raise ValueError(f"devices: unknown device {device!r}; 'auto', 'cpu', 'cuda', 'cuda:0', 'mps', … are known")
    return tuple(str.__str__(device) for device in named)


def _cluster_address(cluster: object) -> ClusterAddress | None:
    """``cluster`` as an address; of an object of Dask's, the address and the security that it has."""
    if cluster is None or isinstance(cluster, ClusterAddress):
        return cluster
    security = None
    address = cluster
    if not isinstance(cluster, str):  # a client, or a cluster, which have both
        security = getattr(cluster, "security", None)
        address = getattr(cluster, "scheduler_address", None) or getattr(
            getattr(cluster, "scheduler", None), "address", None
        )
    if not isinstance(address, str) or not address:
        raise TypeError(
            f"cluster: the address of a Dask scheduler, or a Dask Client, is needed, not {cluster!r:.100}"
            f"{'' if address is cluster else ' (it has no scheduler yet, or is closed)'}"
        )
    if address.startswith("inproc://"):
        raise ValueError(
            "cluster: this one has no processes (processes=False), and its workers would load models in this one: "
            "LocalCluster(processes=True) has, and without a cluster isolation='thread' is one model in this process"
        )
    return ClusterAddress(str.__str__(address), security)


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
        raise ValueError(f"loader: {module}:{name} cannot be imported by a worker: {one_line(error)}") from error
    if not callable(found) or (not isinstance(loader, str) and found is not loader):
        raise ValueError(f"loader: {module}:{name} is not the function that was given; workers import it by its name")
    return f"{module}:{name}"
