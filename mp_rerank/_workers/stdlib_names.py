"""The private names of the standard library that this package relies on: all of them, and what goes without each.

They are looked up when the first kind of worker that needs them is imported. One that nothing works without is an
``ImportError`` that names it and the Python. Of one that there is another way without, the log warns once.

    EVERYWHERE    for any worker process
    FORKSERVER    for ``start_method="forkserver"`` besides

A name may be private by its underscore, or by not being documented. Compared with the sources of CPython 3.10 to 3.14;
``docs/pythons.md`` says what differs.
"""

from __future__ import annotations

import importlib
import logging
import platform
from collections.abc import Iterable
from types import FunctionType
from typing import Any, NamedTuple

from mp_rerank._workers.logs import POOL_LOGGER

__all__ = ["EVERYWHERE", "FORKSERVER", "PrivateName", "check", "missing"]


class PrivateName(NamedTuple):
    """One name.

    Attributes:
        owner: the module, or the class in a module, that has it.
        name: the name itself, or with ``|`` two of which one will do; of a class also an attribute that its instances
            are given as they are made, of a function one that it sets.
        use: what it is for here.
        without: what happens where it is missing; empty: nothing works.
    """

    owner: str
    name: str
    use: str
    without: str = ""

    def __str__(self) -> str:
        return f"{self.owner}.{self.name}"


FUTURE = "concurrent.futures.Future"
EXIT_WAITS = "a process that cannot be killed is waited for as the interpreter exits"

EVERYWHERE = (
    PrivateName(FUTURE, "_condition", "waiters of `wait` and `as_completed` are told of a cancellation"),
    PrivateName(FUTURE, "_waiters", "the same"),
    PrivateName(FUTURE, "_state", "a future is cancelled, or resolved, in one step and without a lock"),
    PrivateName(FUTURE, "_result", "its value is read without a lock"),
    PrivateName(FUTURE, "_exception", "the same"),
    PrivateName(FUTURE, "_invoke_callbacks", "the pool learns that the future is done"),
    PrivateName("concurrent.futures._base", "CANCELLED", "a state of a future"),
    PrivateName("concurrent.futures._base", "CANCELLED_AND_NOTIFIED", "the same"),
    PrivateName("concurrent.futures._base", "FINISHED", "the same"),
    PrivateName("concurrent.futures._base", "RUNNING", "the same"),
    PrivateName(
        "concurrent.futures.process",
        "_ExecutorManagerThread",
        "threads of executors are known: nothing of theirs may wait for the pool",
    ),
    PrivateName(
        "concurrent.futures.process", "_threads_wakeups", "an executor whose process does not end is let go", EXIT_WAITS
    ),
    PrivateName("concurrent.futures.ProcessPoolExecutor", "_executor_manager_thread", "the same", EXIT_WAITS),
    PrivateName("multiprocessing.process", "_children", "the same, and in forks of this process", EXIT_WAITS),
    PrivateName("multiprocessing.process", "ORIGINAL_DIR", "what an empty entry of `sys.path` means"),
    PrivateName(
        "multiprocessing.process.BaseProcess", "_args", "the far ends of an executor's pipes are closed in the parent"
    ),
    PrivateName("multiprocessing.queues.Queue", "_reader", "the same"),
    PrivateName("multiprocessing.queues.Queue", "_writer", "the pipe of tasks is made larger (gevent)"),
    PrivateName("multiprocessing.queues.SimpleQueue", "_writer", "the far ends are closed in the parent"),
    PrivateName("multiprocessing.context.SpawnProcess", "_Popen", "a worker is started without the main module"),
    PrivateName("multiprocessing.spawn", "get_preparation_data", "the same: what a worker is told is replaced"),
    PrivateName("multiprocessing.util", "_args_from_interpreter_flags", "Python's own options, likewise"),
    PrivateName("subprocess", "_args_from_interpreter_flags", "the same"),
    PrivateName(
        "multiprocessing.util",
        "_log_to_stderr",
        "a worker logs as its parent's multiprocessing does",
        "workers keep multiprocessing's own log off",
    ),
    PrivateName("multiprocessing.util", "_logger", "the same", "the same"),
    PrivateName(
        "multiprocessing.spawn._main",
        "_inheriting",
        "a child that is still importing its main module is told to have no pool",
        "it is not told, and each of its workers may start more",
    ),
    PrivateName(
        "multiprocessing.synchronize.SemLock",
        "_make_name",
        "a system without semaphores is told before a worker is started",
        "it is not told before",
    ),
    PrivateName(
        "queue",
        "_PySimpleQueue",
        "a queue that greenlets can wait at",
        "no pool can be started where gevent has replaced threads and left queues",
    ),
    PrivateName(
        "threading",
        "_start_joinable_thread|_start_new_thread",
        "threads that are greenlets are noticed",
        "they are found by trying, which takes a moment",
    ),
    PrivateName(
        "threading",
        "_register_atexit",
        "pools end before concurrent.futures waits for what runs",
        "a program that ends without closing its pool waits for the slices that run",
    ),
)

FORKSERVER = (
    PrivateName("multiprocessing.forkserver", "ForkServer", "a server of our own, beside the program's"),
    PrivateName("multiprocessing.forkserver", "read_signed", "the number of the process that it forked"),
    PrivateName("multiprocessing.forkserver", "_forkserver", "a worker lets go of the server's pipe"),
    PrivateName("multiprocessing.forkserver.ForkServer", "_forkserver_pid", "the server is watched and ended"),
    PrivateName("multiprocessing.forkserver.ForkServer", "_forkserver_alive_fd", "a fork lets go of it"),
    PrivateName("multiprocessing.forkserver.ForkServer", "_inherited_fds", "the same, in a worker"),
    PrivateName("multiprocessing.forkserver.ForkServer", "_stop", "the server's files are closed"),
    PrivateName("multiprocessing.forkserver.ForkServer", "connect_to_new_process", "a worker is asked for"),
    PrivateName("multiprocessing.forkserver.ForkServer", "ensure_running", "a thread that stays starts the server"),
    PrivateName("multiprocessing.popen_forkserver", "Popen", "a worker's process"),
    PrivateName("multiprocessing.popen_forkserver.Popen", "_launch", "the same"),
    PrivateName("multiprocessing.popen_forkserver.Popen", "_fds", "what it inherits"),
    PrivateName("multiprocessing.connection", "answer_challenge", "the server may still be importing (3.14)"),
    PrivateName("multiprocessing.context", "set_spawning_popen", "what a worker is told is pickled for it"),
    PrivateName("multiprocessing.reduction", "dump", "the same"),
    PrivateName("multiprocessing.util", "close_fds", "its pipes are closed with it"),
)


def missing(names: Iterable[PrivateName]) -> list[PrivateName]:
    """Those of ``names`` that this Python does not have."""
    return [name for name in names if not _is_there(name)]


def check(names: Iterable[PrivateName], who: str) -> None:
    """Look up ``names``, for ``who``.

    Raises:
        ImportError: one is missing that there is no other way without.
    """
    gone = missing(names)
    needed = [str(name) for name in gone if not name.without]
    if needed:
        raise ImportError(f"{who} needs {', '.join(needed)}, which Python {platform.python_version()} does not have")
    for name in gone:
        logging.getLogger(POOL_LOGGER).warning(
            "this Python has no %s: %s [mp-rerank explain private-name-missing]", name, name.without
        )


def _is_there(name: PrivateName) -> bool:
    owner = _found(name.owner)
    # What instances are given as they are made, and what a function sets.
    makers = [vars(base).get("__init__") for base in getattr(owner, "__mro__", ())] + [owner]
    set_by = {word for maker in makers if isinstance(maker, FunctionType) for word in maker.__code__.co_names}
    return owner is not None and any(hasattr(owner, one) or one in set_by for one in name.name.split("|"))


def _found(dotted: str) -> Any:
    """A module, or a class in one; ``None`` without it."""
    try:
        return importlib.import_module(dotted)
    except ImportError:
        module, _, name = dotted.rpartition(".")
        return getattr(_found(module), name, None) if module else None
