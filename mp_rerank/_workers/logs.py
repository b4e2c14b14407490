"""A worker's words reach the parent's ``logging``; nothing a worker does reaches the terminal.

One pipe for each worker process: a shared queue's lock could die with a worker and silence the others. The child turns
log records, warnings and prints into small JSON messages; the parent hands them to the logger ``mp_rerank.worker`` with
the worker's name as the record's ``processName``, and in front of the message.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["WORKER_LOGGER", "GuardedLogger", "redirect_output", "repeat_log"]

WORKER_LOGGER = "mp_rerank.worker"


class GuardedLogger(logging.LoggerAdapter):  # type: ignore[type-arg]  # Python 3.10 has it without
    """A logger for a thread that others depend on: what a handler or filter of the caller's raises ends there."""

    def log(self, level: int, msg: object, *args: object, **options: Any) -> None:
        """As ``Logger.log``, naming the same caller."""
        options.setdefault("stacklevel", 2 if sys.version_info >= (3, 11) else 3)  # 3.10 counts logging's own frames
        try:
            super().log(level, msg, *args, **options)
        except Exception:  # there is nobody to tell
            pass


class _Sender(logging.Handler):
    """Child side: a record becomes ``[level, logger, text]`` in the pipe."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.connection = connection

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
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
        try:
            logger.handle(record)
        except Exception:  # a filter or handler of the caller's; the worker must not be left talking to nobody
            pass
    return True
