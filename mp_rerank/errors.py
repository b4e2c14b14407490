"""Every error the pool raises, and nothing else.

    RerankError
     +-- PoolClosedError          the pool no longer takes work: closed, never started here, or the interpreter is
     leaving +-- PoolOverloadedError      pending work is at its bound, and the pool was told not to wait (any longer)
     +-- RequestTimeoutError      the request's ``timeout`` passed before its last document was scored (a TimeoutError)
     +-- ModelLoadError           a worker could not load the model, or what it loaded failed its proof
     +-- ScoringError             the model raised an exception on a document
     +-- WorkerCrashedError       a document killed, or hung, every worker that met it; or no worker is left

Each carries its facts as attributes, holds text only (never a foreign exception, whose unpickling could import torch in
the parent), and survives pickling: ``args`` is the message, the facts travel in ``__dict__``.

Mistakes in the call itself are the usual ``TypeError`` and ``ValueError``, raised where the caller is.
"""

from __future__ import annotations

__all__ = [
    "ModelLoadError",
    "PoolClosedError",
    "PoolOverloadedError",
    "RequestTimeoutError",
    "RerankError",
    "ScoringError",
    "WorkerCrashedError",
]


class RerankError(Exception):
    """Base of every error of this package; also what the pool's own bugs are reported as."""


class PoolClosedError(RerankError):
    """The pool is closed, or belongs to another process (a fork keeps no pool)."""


class PoolOverloadedError(RerankError):
    """Admission was refused.

    Attributes:
        pending_pairs: pairs admitted and not yet scored, when it was refused.
        pending_tokens: their estimated tokens.
    """

    def __init__(self, message: str, *, pending_pairs: int = 0, pending_tokens: int = 0) -> None:
        super().__init__(message)
        self.pending_pairs = pending_pairs
        self.pending_tokens = pending_tokens


class RequestTimeoutError(RerankError, TimeoutError):
    """The request's deadline passed.

    Attributes:
        timeout: the limit that was asked for, in seconds.
        scored: how many of its documents had been scored by then.
        total: how many it has.
    """

    def __init__(self, message: str, *, timeout: float = 0.0, scored: int = 0, total: int = 0) -> None:
        super().__init__(message)
        self.timeout = timeout
        self.scored = scored
        self.total = total


class ModelLoadError(RerankError):
    """A worker has no model to score with.

    Attributes:
        model: the model's name or path.
        device: the device it was for.
        cause: the worker's own words: the exception's type and text, or what the proof found.
        details: the worker's traceback, where there is one.
    """

    def __init__(self, message: str, *, model: str = "", device: str = "", cause: str = "", details: str = "") -> None:
        super().__init__(message)
        self.model = model
        self.device = device
        self.cause = cause
        self.details = details


class ScoringError(RerankError):
    """The model raised on a document; the other documents of its slice were scored.

    Attributes:
        device: where it was scored.
        document_index: the document's position in the request (``None`` until the culprit is isolated).
        cause: the exception's type and text.
        details: the worker's traceback.
    """

    def __init__(
        self, message: str, *, device: str = "", document_index: int | None = None, cause: str = "", details: str = ""
    ) -> None:
        super().__init__(message)
        self.device = device
        self.document_index = document_index
        self.cause = cause
        self.details = details


class WorkerCrashedError(RerankError):
    """A worker process died, and repeating the work could not help.

    Attributes:
        device: the device of the worker that died last.
        exit_code: the process's exit code; negative for the signal that ended it (``-9``: SIGKILL).
        attempts: how many workers died on it.
        document_index: the document's position in the request; ``None`` when no single document is to blame.
    """

    def __init__(
        self,
        message: str,
        *,
        device: str = "",
        exit_code: int | None = None,
        attempts: int = 0,
        document_index: int | None = None,
    ) -> None:
        super().__init__(message)
        self.device = device
        self.exit_code = exit_code
        self.attempts = attempts
        self.document_index = document_index
