"""What runs in a worker, in the order it runs.

    initialize_process(...)   in a worker process, before anything heavy is imported: threads, signals, logs, the watch
                              over the parent
    LoadedModel.load          loads the model and proves it; keeps the outcome, since an executor would swallow it
    LoadedModel.loaded        the first call: that outcome
    LoadedModel.describe      the second: makes the model fast, by a recipe or by proofs, and scores the canary; facts
    LoadedModel.score         every other call

A worker that is forked from a template (``template_child``) inherits a ``LoadedModel`` that is loaded, fast and proved,
and sets its number of threads. That it scores as the template does is proved by the first of the canary's pairs: by the
pool's first worker before it describes itself, and by each later one before it scores anything else.

A worker on a thread has its ``LoadedModel`` in its handle. A worker process has one, which the functions of the same
names in this module ask. Exceptions leave as this package's own, holding text.
"""

from __future__ import annotations

import importlib
import logging
import math
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from multiprocessing.util import Finalize
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from mp_rerank._pairs import CANARY, Pair, PairOptions, Readings, estimate_pair, estimate_text, tolerance
from mp_rerank._recipe import Recipe
from mp_rerank._shadowing import shadowing
from mp_rerank._workers import heap
from mp_rerank._workers.lazy_import import deferred
from mp_rerank._workers.logs import redirect_output
from mp_rerank.config import ModelSpec
from mp_rerank.errors import ModelLoadError, ScoringError

if TYPE_CHECKING:
    from mp_rerank._engine.engine import Engine

__all__ = [
    "Launch",
    "LoadedModel",
    "Options",
    "Pairs",
    "Scored",
    "WorkerFacts",
    "describe",
    "die_with_parent_thread",
    "in_worker_process",
    "initialize_process",
    "keep_off_other_cpus",
    "load_as_template",
    "loaded",
    "score",
    "set_threads",
]

Pairs = Sequence[Pair]
#: how each pair is read; ``None``: all of them plainly
Options = Sequence[PairOptions] | None

# Libraries read these once, when they are first imported.
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",  # the tokenizer's
)
# Any of these, or OMP_PROC_BIND=true, makes a process bind its threads from the first CPU on: measured, every worker of
# one thread then sits on CPU 0.
BINDING_VARIABLES = ("GOMP_CPU_AFFINITY", "KMP_AFFINITY", "OMP_PLACES")
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
# After so many slices what memory is free is given back, which takes a millisecond; the next slice clears pages anew.
SLICES_A_TRIM = 32
# The exit code of a worker whose process can use its GPU no more: another process can.
EXIT_DEVICE_LOST = 75
# The exit code of a worker that does not score as the template that it was forked from.
EXIT_UNPROVED = 78
# What a worker process sends first of all, through the pipe of its logs: it has come as far as running this module.
FIRST_WORD = b"began"
QUIET_VARIABLES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}

# A second model loading in another thread is the very race this package is about.
_one_load_at_a_time = threading.Lock()
# In a worker process: the slices it has scored.
_slices = 0
# In a worker process, or a template: its model.
_model: LoadedModel | None = None
# What ``import_engine`` raised, here or in the server that this process was forked from.
_import_error: Exception | None = None


@dataclass(frozen=True)
class Launch:
    """What a worker is to load, and where.

    Attributes:
        name: what its logs, its thread and its process are called.
        spec: the model, pickled: unpickling it may import anything.
        device: the worker's for good.
        threads: compute threads; ``None`` leaves the settings of the process alone.
        batch_tokens: padded tokens of one forward pass.
        cpus: the logical CPUs to stay on; empty: wherever the process may run.
        offline: load from the hub's cache, and ask no hub.
    """

    name: str
    spec: bytes
    device: str
    threads: int | None
    batch_tokens: int
    cpus: tuple[int, ...] = ()
    offline: bool = False


class Scorer(Protocol):
    """What a loaded model must do: scores of shape (n,) or (n, num_labels) for n pairs.

    ``Engine`` does more: it has ``readings`` and ``tokenize_seconds``, of the pairs last scored, and ``takes`` and
    ``prompts`` as `WorkerFacts` has them. It is given the pairs' options, as a second argument, where they are not all
    plain.

    One with ``optimize(recipe)`` can be made fast. One with ``set_threads(threads)`` is told, in a fork of a template,
    how many it may compute with.
    """

    def predict(self, pairs: list[tuple[str, str]]) -> Any: ...


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself once its model is loaded, made fast and proved."""

    pid: int
    dtype: str
    load_seconds: float
    weights_bytes: int
    mapped_bytes: int
    num_labels: int
    max_length: int | None
    canary: tuple[float, ...]
    tokens_per_second: float
    recipe: Recipe | None = None  # None: the model cannot be optimized
    activation: str = ""
    takes: frozenset[str] = frozenset()  # the options of a request about its pairs that the model can follow
    prompts: Mapping[str, str] = field(default_factory=dict)  # by their names


@dataclass(frozen=True)
class Scored:
    """A slice's scores: float32 bytes (a pickle of bytes needs no numpy and no torch), and what they cost."""

    scores: bytes
    num_labels: int | None  # None: one score a pair, shape (n,)
    seconds: float
    readings: Readings | None = None  # None: the model counts no tokens
    tokenize_seconds: float | None = None  # of ``seconds``; None: the model does not tell


class LoadedModel:
    """A worker's model: loaded once, made fast and described once, then scoring. One thread calls it.

    Args:
        launch: what to load.
        owns_process: whether the process is there to score: its libraries are then set up for that, and it ends where
            it can use its GPU no more.
        forks: whether the process is a template.
    """

    def __init__(self, launch: Launch, *, owns_process: bool = False, forks: bool = False) -> None:
        self._launch = launch
        self._owns_process = owns_process
        self._forks = forks
        self._model = "the model"
        self._scorer: Scorer
        self._facts: dict[str, Any]
        self._load_seconds = 0.0
        self._canary: tuple[tuple[float, ...], float] | None = None
        self._short_canary: tuple[float, ...] = ()  # in a template and its forks: the score of the first pair, alone
        self._unproved = False  # whether this is a fork's, and has not scored that pair there
        self._error: ModelLoadError | None = None

    def load(self) -> None:
        """Load the model and prove it whole.

        Never raises: an exception in an initializer would reach the parent as a bare ``BrokenProcessPool``.
        ``loaded`` tells.
        """
        try:
            with _one_load_at_a_time:
                start = time.perf_counter()
                spec: ModelSpec = pickle.loads(self._launch.spec)
                self._model = spec.name if spec.loader is None else str(spec.loader)
                self._scorer, self._facts = _load(spec, self._launch, owns_process=self._owns_process)
                self._load_seconds = time.perf_counter() - start
        except BaseException as error:
            self._error = self._in_words(error)

    def move_to(self, launch: Launch) -> None:
        """Be the model of another worker, whose process was forked from this one."""
        self._launch = launch
        self._unproved = True
        if launch.threads is not None and hasattr(self._scorer, "set_threads"):
            self._scorer.set_threads(launch.threads)

    def loaded(self) -> None:
        """Return once the model is loaded; raises the ``ModelLoadError`` that loading ended in."""
        if self._error is not None:
            logging.getLogger(__name__).debug("%s", self._error.details)
            raise self._error

    def describe(self, recipe: Recipe | None) -> WorkerFacts:
        """Make the loaded model fast, score the canary, and say what there is to say of this worker.

        Args:
            recipe: what another worker with this model has found; ``None``: find it. A model that was made fast before,
                in a template, stays as it is; its first worker scores a pair of the canary, and the canary's scores are
                the template's.

        Raises:
            ModelLoadError: what is wrong with the model.
        """
        try:
            with _one_load_at_a_time:
                return self._prepare(recipe)
        except BaseException as error:
            failure = self._in_words(error)
            logging.getLogger(__name__).debug("%s", failure.details)
            raise failure from None

    def _prepare(self, recipe: Recipe | None) -> WorkerFacts:
        if self._canary is None:
            if hasattr(self._scorer, "optimize"):
                self._facts = self._scorer.optimize(recipe).facts()
            self._canary = _score_canary(self._scorer)
            if self._forks:
                self._short_canary, _ = _score_canary(self._scorer, CANARY[:1])
        elif recipe is None:
            self._prove_fork()
        canary, tokens_per_second = self._canary
        return WorkerFacts(
            pid=os.getpid(),
            load_seconds=self._load_seconds,
            num_labels=len(canary) // len(CANARY),
            canary=canary,
            tokens_per_second=tokens_per_second,
            **self._facts,
        )

    def _prove_fork(self) -> None:
        """Raise ``ValueError`` if the canary's first pair scores otherwise here than in the template.

        It takes longer than the fork: what a process writes to for the first time after a fork is copied, page by page.
        """
        scores, _ = _score_canary(self._scorer, CANARY[:1])
        limit = tolerance("another worker", self._facts["dtype"])
        pairs = zip(scores, self._short_canary, strict=True)
        if not all(math.isclose(own, theirs, rel_tol=limit, abs_tol=limit) for own, theirs in pairs):
            raise ValueError(f"its template scores the canary {self._short_canary}, and this fork of it {scores}")
        self._unproved = False

    def _in_words(self, error: BaseException) -> ModelLoadError:
        cause = _in_words(error) + shadowing(error)
        return ModelLoadError(
            f"{self._model} could not be loaded on {self._launch.device}: {cause}",
            model=self._model,
            device=self._launch.device,
            cause=cause,
            details=traceback.format_exc(),
        )

    def score(self, pairs: Pairs, options: Options = None) -> Scored:
        """Scores of ``pairs``, read by ``options``, in their order.

        Raises:
            ScoringError: with whatever the model raised, as text.
        """
        if self._unproved:
            self._prove_fork_or_leave()
        start = time.perf_counter()
        try:
            scores, num_labels = _predict(self._scorer, pairs, options)
        except BaseException as error:
            if self._owns_process and _has_lost_its_device(error):
                logging.getLogger(__name__).error(
                    "leaving, for this process cannot use its GPU any more: %s [mp-rerank explain gpu-lost]", error
                )
                os._exit(EXIT_DEVICE_LOST)
            raise ScoringError(
                f"the model raised {_in_words(error)}",
                device=self._launch.device,
                cause=_in_words(error),
                details=traceback.format_exc(),
            ) from None
        seconds = time.perf_counter() - start
        readings: Readings | None = getattr(self._scorer, "readings", None)
        return Scored(scores, num_labels, seconds, readings, getattr(self._scorer, "tokenize_seconds", None))

    def _prove_fork_or_leave(self) -> None:
        try:
            self._prove_fork()
        except BaseException as error:
            logging.getLogger(__name__).error(
                "leaving, for this worker does not score as it should: %s [mp-rerank explain fork-differs]", error
            )
            os._exit(EXIT_UNPROVED)


def in_worker_process() -> bool:
    """Whether this process is a worker of some pool: a pool inside one would be a process storm."""
    return _model is not None


def initialize_process(launch: Launch, logs: Connection, log_level: int) -> None:
    """The initializer of a worker process.

    Args:
        launch: what to load.
        logs: where to send what is logged and printed here, from ``log_level`` up.
    """
    global _model
    logs.send_bytes(FIRST_WORD)
    forked = _model  # a template's, which has loaded it
    _model = forked or LoadedModel(launch, owns_process=True)
    if hasattr(signal, "pthread_sigmask"):  # the thread that started this process had it blocked
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPIPE})
    if forked is None:
        die_with_parent_thread()
    else:
        _go_on_without_template()
    _let_go_of_server()
    # Before there is a second thread, which would inherit the old affinity.
    pinned = keep_off_other_cpus(launch.cpus)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    Finalize(None, _leave_at_once, exitpriority=-1000)  # after everybody else's
    threading.Thread(target=_leave_with_parent, name="parent-watch", daemon=True).start()
    set_threads(launch.threads or 1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false" if launch.threads == 1 else "true")
    # Some models (ModernBERT in transformers 4) have torch compile them, whose helpers would be processes of their own,
    # which nobody ends when the worker is killed.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if launch.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    redirect_output(logs, log_level)
    if not pinned:
        logging.getLogger(__name__).warning(
            "this worker cannot be kept on the CPUs %s [mp-rerank explain worker-not-pinned]", launch.cpus
        )
    if forked is None:
        _model.load()
    else:
        forked.move_to(launch)


def load_as_template(launch: Launch, recipe: Recipe | None) -> WorkerFacts:
    """Load the model and make it fast, for the workers that are forked from this process. Raises ``ModelLoadError``."""
    global _model
    _model = LoadedModel(launch, owns_process=True, forks=True)
    _model.load()
    _model.loaded()
    return _model.describe(recipe)


def loaded() -> None:
    """In a worker process: ``LoadedModel.loaded``."""
    assert _model is not None
    _model.loaded()


def describe(recipe: Recipe | None) -> WorkerFacts:
    """In a worker process: ``LoadedModel.describe``."""
    assert _model is not None
    return _model.describe(recipe)


def score(pairs: Pairs, options: Options = None) -> Scored:
    """In a worker process: ``LoadedModel.score``. Memory is kept from slice to slice, and now and then given back."""
    global _slices
    assert _model is not None
    if _slices % SLICES_A_TRIM == 0:
        heap.keep_memory()
    _slices += 1
    return _model.score(pairs, options)


def set_threads(threads: int) -> None:
    """Let what is imported from now on compute with so many threads, on any CPU this process may use."""
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, str(threads)), OMP_PROC_BIND="false", **QUIET_VARIABLES)
    for name in BINDING_VARIABLES:
        os.environ.pop(name, None)


def _load(spec: ModelSpec, launch: Launch, *, owns_process: bool) -> tuple[Scorer, dict[str, Any]]:
    """The scorer and its share of the facts."""
    loaded: Any = None
    if spec.loader is not None:
        module, _, name = spec.loader.partition(":")  # type: ignore[union-attr]
        loader: Any = __import__(module, fromlist=["_"])
        for part in name.split("."):
            loader = getattr(loader, part)
        loaded = loader(spec, launch.device)
        if not hasattr(loaded, "parameters"):  # no torch module: nothing to prove, and torch stays unimported
            if not callable(getattr(loaded, "predict", None)):
                raise TypeError(f"the loader returned {type(loaded).__name__}, which has no predict(pairs)")
            facts: dict[str, Any] = {"dtype": "", "weights_bytes": 0, "mapped_bytes": 0, "max_length": spec.max_length}
            for name in ("takes", "prompts"):
                if hasattr(loaded, name):
                    facts[name] = getattr(loaded, name)
            return loaded, facts
    engine = _engine_type(fast_import=owns_process)(
        spec, launch.device, launch.threads, launch.batch_tokens, loaded, owns_process=owns_process
    )
    return engine, engine.facts()


def import_engine() -> None:
    """Import what it takes to load and score, and no more: this process will do nothing else.

    What goes wrong is kept, and raised when a model is loaded, unless the plain import then works.
    """
    global _import_error
    try:
        with deferred("sklearn"):
            importlib.import_module("mp_rerank._engine.engine")
    except Exception as error:
        _import_error = _import_error or error


def _engine_type(*, fast_import: bool) -> type[Engine]:
    """``Engine``. Raises the first error that importing it ended in: torch, once half imported, fails in other ways."""
    if fast_import:
        import_engine()
    try:
        from mp_rerank._engine.engine import Engine
    except Exception as error:
        first = _import_error or error
    else:
        return Engine
    raise first  # not within the except clause, which would make the later error its context


def _score_canary(scorer: Scorer, pairs: Pairs = CANARY) -> tuple[tuple[float, ...], float]:
    """The canary's scores, flat, and the estimated tokens a second they were scored at."""
    import numpy as np

    tokens = sum(estimate_pair(estimate_text(query), document, None) for query, document in pairs)
    start = time.perf_counter()
    scores, _ = _predict(scorer, pairs)
    seconds = time.perf_counter() - start
    canary = tuple(np.frombuffer(scores, dtype=np.float32).tolist())
    if not np.isfinite(canary).all():
        raise ValueError(f"the canary pairs score {canary}: not finite")
    return canary, tokens / max(seconds, 1e-9)


def _predict(scorer: Any, pairs: Pairs, options: Options = None) -> tuple[bytes, int | None]:
    import numpy as np

    arguments = (list(pairs),) if options is None else (list(pairs), options)
    scores = np.asarray(scorer.predict(*arguments), dtype=np.float32)
    if scores.ndim not in (1, 2) or len(scores) != len(pairs):
        raise ValueError(f"scores of shape {scores.shape} for {len(pairs)} pairs")
    return scores.tobytes(), None if scores.ndim == 1 else scores.shape[1]


def _has_lost_its_device(error: BaseException) -> bool:
    """Whether every later call to CUDA in this process fails too, as it does not once memory has run out."""
    return isinstance(error, RuntimeError) and str(error).startswith("CUDA error")


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def keep_off_other_cpus(cpus: Sequence[int]) -> bool:
    """Keep this thread, and those it starts, on ``cpus``, if they are any; whether the system lets it."""
    if not cpus:
        return True
    try:
        os.sched_setaffinity(0, cpus)
    except (AttributeError, OSError):  # not on this system, or the container has other CPUs by now
        return False
    return True


def _leave_at_once() -> NoReturn:
    """End this process without taking the interpreter apart, which takes a second with torch in it."""
    logging.shutdown()
    os._exit(0)


def die_with_parent_thread() -> None:
    """Have the system kill this process when the thread that started it ends (Linux), even if this process is stopped.

    A worker is started by a thread that watches it to its end, or by the fork server, which has only one.
    """
    _on_parent_s_end("SIGKILL")


def _go_on_without_template() -> None:
    """Live on when the template ends that this worker was forked from (Linux).

    A template ends with the pool's process, too, and then a worker that is stopped must be able to see that: so the
    system lets it run again.
    """
    _on_parent_s_end("SIGCONT")


def _on_parent_s_end(name: str) -> None:
    """Have the system send this process the signal ``name`` when the thread that started it ends (Linux)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, getattr(signal, name), 0, 0, 0)
    except (AttributeError, OSError):  # another kind of C library; the watch over the parent is there too
        pass


def _let_go_of_server() -> None:
    """In a worker that was forked by a server: close what tells the server that somebody needs it.

    multiprocessing hands it to every child. So a server would stay for as long as any worker does, stopped ones too.
    """
    server: Any = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)
    if server is not None and server._forkserver_alive_fd is not None and server._inherited_fds is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None


def _leave_with_parent() -> NoReturn:
    """End this process when the parent ends, however that ends, and whatever this process is doing."""
    import psutil

    parent = parent_process()
    assert parent is not None
    assert parent.pid is not None
    try:
        watched = psutil.Process(parent.pid)
        # The join wakes at once when the parent dies. A fork of the parent holds the pipe behind it open, so look at
        # the process itself now and then; is_running compares creation times, and a zombie is as good as gone.
        while watched.is_running() and watched.status() != psutil.STATUS_ZOMBIE:
            parent.join(timeout=1.0)
            if not parent.is_alive():
                break
    except psutil.Error:
        pass
    os._exit(1)
