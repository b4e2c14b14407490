"""What runs in a template: the model is loaded, proved and made fast by one thread, and workers are forked from it.

A fork takes no thread along but its own. So there must be no other when a worker is forked: a library that has started
some would wait for them in the worker, for ever. Nothing here computes with more than one thread, and that is checked
before each fork. A worker sets its own number.

No hub is connected and no GPU is touched. Garbage collection leaves alone what was there before the first fork: it
would write to every object of it, and so copy all of it into every worker.
"""

from __future__ import annotations

import concurrent.futures.process
import gc
import multiprocessing.popen_forkserver
import multiprocessing.queues
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from mp_rerank._recipe import Recipe
from mp_rerank._workers import child, heap
from mp_rerank._workers.child import Launch
from mp_rerank._workers.logs import redirect_output
from mp_rerank.errors import ModelLoadError

__all__ = ["EXIT_FETCHED", "Began", "Ready", "serve"]

# The exit code of a template that has fetched its model, and cannot fork for the threads which that has left.
EXIT_FETCHED = 76
EXIT_THREADS = 77
# Every worker needs them: to import them here takes 2 ms from each fork.
PRELOADED = (concurrent.futures.process, multiprocessing.popen_forkserver, multiprocessing.queues, psutil)
TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class Began:
    """A template's first word."""


@dataclass(frozen=True)
class Ready:
    """A template's last word: it forks workers from now on; how it has made the model fast."""

    recipe: Recipe | None


def serve(
    launch: Launch,
    recipe: Recipe | None,
    listener: socket.socket,
    alive: Connection,
    words: Connection,
    logs: Connection,
    log_level: int,
) -> None:
    """The template's life.

    Args:
        launch: what to load, for one thread.
        recipe: how to make it fast; ``None``: find it.
        listener: where workers are asked for.
        alive: its end is the end of whoever may ask.
        words: where to say ``Began``, and then ``Ready`` or the ``ModelLoadError``.
        logs: where to send what is logged and printed.
        log_level: from which level up.
    """
    child.die_with_parent_thread()
    words.send(Began())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child.keep_off_other_cpus(launch.cpus)
    redirect_output(logs, log_level)
    try:
        facts = _load(launch, recipe)
    except ModelLoadError as error:
        words.send(error)
        os._exit(0)
    _prepare_to_fork()
    words.send(Ready(facts.recipe))
    words.close()
    os.register_at_fork(before=_leave_unless_alone, after_in_child=logs.close)
    forkserver.main(listener.detach(), alive.fileno(), [])


def _load(launch: Launch, recipe: Recipe | None) -> child.WorkerFacts:
    """Load the model; raises ``ModelLoadError``, also where that leaves threads behind."""
    child.set_threads(1)
    chosen = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # torch.cuda.is_available() then asks the driver, not CUDA
    if launch.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    _silence_tqdm_monitor()
    facts = child.load_as_template(launch, recipe)
    os.environ.pop("TOKENIZERS_PARALLELISM")
    if chosen is not None:
        os.environ["TOKENIZERS_PARALLELISM"] = chosen
    _disconnect()
    threads = _threads()
    if len(threads) > 1:
        if not launch.offline:
            os._exit(EXIT_FETCHED)
        words = f"loading it leaves {len(threads) - 1} threads behind, and a process with threads cannot be forked"
        cause = f"{words} ({', '.join(threads[1:])}): another start_method is needed for this model"
        raise ModelLoadError(
            f"the model could not be loaded in a template on {launch.device}: {cause}",
            device=launch.device,
            cause=cause,
        )
    return facts


def _silence_tqdm_monitor() -> None:
    """Progress bars, of which there are none, would be watched by a thread of tqdm's."""
    try:
        from tqdm import tqdm
    except ImportError:
        return
    tqdm.monitor_interval = 0


def _disconnect() -> None:
    """Close what connections to a hub loading has made: two workers must not talk over one."""
    hub = sys.modules.get("huggingface_hub")
    for name in ("close_session", "reset_sessions"):  # by version
        close = getattr(getattr(hub, "utils", None), name, None) or getattr(hub, name, None)
        if callable(close):
            close()
            return


def _prepare_to_fork() -> None:
    """Give back what memory is free, and let garbage collection leave alone what is in use."""
    gc.collect()
    gc.freeze()
    heap.give_back_memory()


def _leave_unless_alone() -> None:
    """Before a fork: end this process if it has got other threads by now. Another template is then made."""
    if len(_threads()) > 1:
        os._exit(EXIT_THREADS)


def _threads() -> list[str]:
    """The names of this process's threads, whoever has started them; its first one at the head."""
    try:
        tasks = sorted(TASKS.iterdir(), key=lambda task: int(task.name) != os.getpid())
        return [(task / "comm").read_text().strip() for task in tasks]
    except OSError:  # no /proc; or one has just ended
        return [thread.name for thread in __import__("threading").enumerate()]
