"""Threads that are not the system's: gevent and eventlet replace the standard library's by greenlets.

Greenlets share one thread of the system and take turns. One that waits inside a system call, which nobody has replaced,
keeps all the others from running. So what waits here has to know which kind of threads there is.

Only the threads may be replaced, or only the queues: each is looked at by itself.
"""

from __future__ import annotations

import _queue
import _thread
import os
import queue
import threading
import time
from multiprocessing import connection
from types import BuiltinFunctionType
from typing import Any

__all__ = ["check_waits", "let_files_close", "make_queue", "threads_are_green"]

# How long something is waited for that takes no time, unless this very wait keeps it from happening.
PATIENCE_SECONDS = 0.2


def threads_are_green() -> bool:
    """Whether ``threading.Thread`` makes greenlets."""
    global _known
    start = getattr(threading, "_start_joinable_thread", None) or getattr(threading, "_start_new_thread", None)
    if isinstance(start, BuiltinFunctionType) and isinstance(_thread.start_new_thread, BuiltinFunctionType):
        return False
    if _known is None or _known[0] is not start:
        _known = (start, not _runs_beside_a_blocked_thread())  # a debugger replaces the function too
    return _known[1]


_known: tuple[Any, bool] | None = None


def make_queue() -> Any:
    """A ``queue.SimpleQueue`` that threads of the present kind can wait at."""
    replaced = getattr(queue, "SimpleQueue", None) is not _queue.SimpleQueue
    if threads_are_green():
        # Written in Python, it waits as ``threading`` does.
        return queue.SimpleQueue() if replaced else queue._PySimpleQueue()  # type: ignore[attr-defined]
    return _queue.SimpleQueue()


def let_files_close() -> None:
    """Have what this thread has closed really be closed.

    gevent replaces ``os.close`` too, and puts it off until its loop of this thread runs, which it does in ``sleep``. A
    pipe of which this process keeps a copy would have no end.
    """
    if not isinstance(os.close, BuiltinFunctionType):
        time.sleep(0.001)


def check_waits() -> None:
    """Raise ``RuntimeError`` where greenlets would wait for each other for ever.

    That is so where only a part of the standard library is replaced, or where it was replaced after others had taken
    copies of what was there before.
    """
    if not threads_are_green():
        return
    waiting = make_queue()
    ready, written = os.pipe()
    blocked = []
    try:
        # Each is waited for in the way the pool does it, and brought about by a thread.
        _start(waiting.put, True)
        try:
            waiting.get(timeout=PATIENCE_SECONDS)
        except queue.Empty:
            blocked.append("queue")
        _start(os.write, written, b".")
        if not connection.wait([ready], PATIENCE_SECONDS):
            blocked.append("select")
        elif not _two_can_wait(ready):
            blocked.append("select (two for one file)")
        gate = threading.Lock()
        gate.acquire()
        _start(gate.release)
        if not gate.acquire(timeout=PATIENCE_SECONDS):
            blocked.append("threading")
    finally:
        os.close(ready)
        os.close(written)
    if blocked:
        raise RuntimeError(
            f"a RerankerPool cannot be started here: threads are greenlets (gevent or eventlet has replaced them), and "
            f"waiting in {' and in '.join(blocked)} stops them all. What works: monkey.patch_all() of gevent before "
            "anything else is imported; eventlet.monkey_patch(thread=False); a pool in a process that is not patched"
        )


def _two_can_wait(file: int) -> bool:
    """Whether two threads can wait for one file, as a worker's threads do for its end; eventlet lets one."""
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            connection.wait([file], PATIENCE_SECONDS)
        except BaseException as error:
            errors.append(error)

    os.read(file, 1)  # so that there is something to wait for
    _start(wait)
    wait()
    return not errors


def _runs_beside_a_blocked_thread() -> bool:
    done: Any = _queue.SimpleQueue()
    _start(done.put, True)
    try:
        done.get(timeout=PATIENCE_SECONDS)
    except queue.Empty:
        return False
    return True


def _start(target: Any, *args: Any) -> None:
    """Have another thread make the call, and not before this one waits, if it can only be one of the two."""
    go = threading.Event()

    def call() -> None:
        go.wait()
        target(*args)

    threading.Thread(target=call, daemon=True).start()
    go.set()
