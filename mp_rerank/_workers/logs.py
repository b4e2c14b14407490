"""What is logged: by the pool, to the logger ``mp_rerank.pool``; by its workers, to ``mp_rerank.worker``.

Handlers and filters are the caller's code: they may block, raise, or call the pool. So they run on a thread of their
own, ``mp_rerank-log``, which starts with the first record and ends when there are none. Records wait for it in a queue
of `MAX_QUEUED`; what comes while that is full is dropped, and counted in the log.

A worker process writes nothing to the terminal. It turns log records, warnings and prints into small JSON messages and
sends them down a pipe of its own (a shared queue's lock could die with a worker and silence the others). In the parent
the logger ``mp_rerank.worker`` gets them, with the worker's name as the record's ``processName`` and in front of the
message.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import sys
import threading
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any

from mp_rerank._text import one_line, printable
from mp_rerank._workers.green import make_queue

__all__ = ["POOL_LOGGER", "WORKER_LOGGER", "QueuedLogger", "flush", "redirect_output", "repeat_log"]

POOL_LOGGER = "mp_rerank.pool"
WORKER_LOGGER = "mp_rerank.worker"

# Records that may wait for a slow handler.
MAX_QUEUED = 10_000
# How long the thread waits for another record before it ends.
IDLE_SECONDS = 0.5


class QueuedLogger:
    """A logger for threads that others depend on: a record is queued, and handled on a thread of its own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def debug(self, msg: str, *args: object) -> None:
        """Log at DEBUG."""
        self._log(logging.DEBUG, msg, args, sys._getframe(1))

    def info(self, msg: str, *args: object) -> None:
        """Log at INFO."""
        self._log(logging.INFO, msg, args, sys._getframe(1))

    def warning(self, msg: str, *args: object) -> None:
        """Log at WARNING."""
        self._log(logging.WARNING, msg, args, sys._getframe(1))

    def error(self, msg: str, *args: object) -> None:
        """Log at ERROR."""
        self._log(logging.ERROR, msg, args, sys._getframe(1))

    def exception(self, msg: str, *args: object) -> None:
        """Log at ERROR, with the traceback of the exception that is being handled."""
        self._log(logging.ERROR, msg, args, sys._getframe(1), sys.exc_info())

    def _log(self, level: int, msg: str, args: tuple[object, ...], caller: FrameType, exc_info: Any = None) -> None:
        logger = logging.getLogger(self.name)
        if not logger.isEnabledFor(level):
            return
        text = one_line(msg % args if args else msg)  # now: the arguments go on changing
        code = caller.f_code
        record = logger.makeRecord(
            logger.name, level, code.co_filename, caller.f_lineno, text, (), exc_info, func=code.co_name
        )
        _queue(record)


# The thread that calls handlers. No lock is held while they run: `_handling` only says whether there is such a thread.
_records: queue.SimpleQueue[logging.LogRecord | threading.Lock] = make_queue()  # of the threads that there are now
_handling = threading.Lock()
_dropped = 0

# Taken while a handler runs, for `_before_fork` alone, which waits no longer than this: a handler may wait for what the
# forking thread holds. On a busy machine a thread may be off its core for tenths of a second in the middle of a line.
_calling = threading.Lock()
FORK_SECONDS = 2.0
_paused = threading.local()


def flush(timeout: float) -> None:
    """Wait until what was logged so far has been handled, ``timeout`` seconds at most: a handler may block."""
    if _records.empty() and not _handling.locked():
        return
    gate = threading.Lock()
    gate.acquire()
    _records.put(gate)
    _start_handling()
    gate.acquire(timeout=timeout)


def _queue(record: logging.LogRecord) -> None:
    global _dropped
    if _records.qsize() >= MAX_QUEUED:
        _dropped += 1
        return
    _records.put(record)
    _start_handling()


def _start_handling() -> None:
    if _handling.locked():
        return
    try:
        threading.Thread(target=_handle_queued, name="mp_rerank-log", daemon=True).start()
    except RuntimeError:  # the system has no thread left, or the interpreter is leaving
        pass


def _handle_queued() -> None:
    while not _records.empty() and _handling.acquire(blocking=False):
        try:
            while True:
                _handle(_records.get(timeout=IDLE_SECONDS))
        except queue.Empty:
            pass
        finally:
            _handling.release()


def _handle(record: logging.LogRecord | threading.Lock) -> None:
    global _dropped
    if not isinstance(record, logging.LogRecord):
        record.release()
        return
    try:
        logger = logging.getLogger(record.name)
        if _dropped:
            dropped, _dropped = _dropped, 0
            logger.warning(
                "%d log records were dropped: a handler was too slow for them [mp-rerank explain records-dropped]",
                dropped,
            )
        with _calling:
            logger.handle(record)
    except BaseException:  # SystemExit too: there is nobody to tell
        pass


def _before_fork() -> None:
    """Let a handler finish what it writes: a fork made in the middle finds the lock of the standard error taken by
    nobody, and waits for ever as it exits.
    """
    _paused.taken = _calling.acquire(timeout=FORK_SECONDS)


def _after_fork() -> None:
    if _paused.taken:
        _calling.release()


def _forget_thread() -> None:
    """In a fork of this process: it has no such thread, and nothing to say of its parent's pools."""
    global _records, _handling, _calling
    _calling = threading.Lock()
    _records = make_queue()
    _handling = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_thread)


_TRACEBACKS = logging.Formatter()


class _Sender(logging.Handler):
    """Child side: a record becomes ``[level, logger, text]`` in the pipe, its text safe to print."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = one_line(record.getMessage())
            if record.exc_info:
                text += "\n" + printable(_TRACEBACKS.formatException(record.exc_info))
            self.connection.send_bytes(json.dumps([record.levelno, record.name, text]).encode())
        except Exception:  # the parent is gone, or the record is broken: neither may stop scoring
            pass


class _Lines:
    """Child side: a text stream whose complete lines are logged."""

    encoding = "utf-8"

    def __init__(self, logger: logging.Logger) -> None:
        self.logger = logger
        self.rest = ""

    def write(self, text: str) -> int:
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.strip():
                self.logger.info("%s", line.rstrip())
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def redirect_output(connection: Connection, level: int) -> None:
    """In a fresh worker process: send everything said from here on through ``connection``, from ``level`` up."""
    root = logging.getLogger()
    root.handlers[:] = [_Sender(connection)]
    if root.level != level:  # in a fork of a template it is that; to set it touches every logger there is, 300 pages
        root.setLevel(level)
    logging.captureWarnings(True)
    sys.stdout = sys.stderr = _Lines(logging.getLogger("output"))
    # What native code writes goes past sys.stderr.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def repeat_log(connection: Connection, name: str) -> bool:
    """In the parent, on a thread of its own: repeat the next thing worker ``name`` says; whether there may be more."""
    try:
        level, source, text = json.loads(connection.recv_bytes())
    except (EOFError, OSError, ValueError):  # closed, or cut off in the middle by the worker's death
        return False
    logger = logging.getLogger(WORKER_LOGGER)
    if logger.isEnabledFor(level):
        record = logger.makeRecord(logger.name, level, source, 0, "%s: %s: %s", (name, source, text), None)
        record.processName = name
        _queue(record)
    return True
