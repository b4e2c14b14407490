"""Every error the pool raises.

    RerankError
     +-- PoolClosedError         the pool is closed, belongs to another process, or the interpreter is exiting
     +-- PoolOverloadedError     pending work is at its bound, and the pool was told not to wait (any longer)
     +-- RequestTimeoutError     the request's ``timeout`` passed before all was scored; also a ``TimeoutError``
     +-- ModelLoadError          a worker could not load the model, or the loaded model failed its proof
     +-- ScoringError            the model raised an exception on a document, or its score is no finite number
     +-- TextTooLongError        a document is longer than the request allows; also a ``ValueError``
     +-- WorkerCrashedError      a document ended every worker that had it, or no worker is left
     +-- ClusterError            a Dask cluster cannot be used, or its scheduler is lost and no worker is left

Each error has its facts as attributes. They are text and numbers only: a foreign exception could import torch into the
parent when it is unpickled. Errors survive pickling: ``args`` holds the message, ``__dict__`` the facts.

Each has an entry in ``troubleshooting.md``, which ``mp-rerank explain NAME`` prints. A traceback's last line
says so, and warnings and errors in the log end with it, too.

Messages and causes hold other people's text. They are made safe to print here, for all who raise them: see `_text`.

A mistake in a call is the usual ``TypeError`` or ``ValueError``, raised in the caller's thread.
"""

from __future__ import annotations

from mp_rerank._text import one_line, printable

__all__ = [
    "ClusterError",
    "ModelLoadError",
    "PoolClosedError",
    "PoolOverloadedError",
    "RequestTimeoutError",
    "RerankError",
    "ScoringError",
    "TextTooLongError",
    "WorkerCrashedError",
]


class RerankError(Exception):
    """Base of every error of this package; the pool reports its own bugs as this."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))
        if hasattr(self, "add_note"):  # Python 3.11; shown at the end of a traceback
            self.add_note(f"What it means and what to do: mp-rerank explain {type(self).__name__}")


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
        cause: the type and text of the exception in the worker, or what the proof found; one line.
        details: the worker's traceback, where there is one.
    """

    def __init__(self, message: str, *, model: str = "", device: str = "", cause: str = "", details: str = "") -> None:
        super().__init__(message)
        self.model = model
        self.device = device
        self.cause = one_line(cause)
        self.details = printable(details)


class ScoringError(RerankError):
    """The model raised an exception on a document, or scored it as nan or infinite.

    The other documents of its slice were scored.

    Attributes:
        device: where it was scored.
        document_index: the document's position in the request; ``None`` while it is not known which one it was.
        cause: the exception's type and text; one line.
        details: the worker's traceback.
    """

    def __init__(
        self, message: str, *, device: str = "", document_index: int | None = None, cause: str = "", details: str = ""
    ) -> None:
        super().__init__(message)
        self.device = device
        self.document_index = document_index
        self.cause = one_line(cause)
        self.details = printable(details)


class TextTooLongError(RerankError, ValueError):
    """A document is longer than may be read, and the request has ``truncation="error"``.

    Attributes:
        document_index: the document's position in the request.
        tokens: how many it has: with its query, or alone where ``limit`` is the request's ``max_tokens_per_doc``.
        limit: how many are allowed.
    """

    def __init__(self, message: str, *, document_index: int | None = None, tokens: int = 0, limit: int = 0) -> None:
        super().__init__(message)
        self.document_index = document_index
        self.tokens = tokens
        self.limit = limit


class WorkerCrashedError(RerankError):
    """Worker processes died, and the work is not tried again.

    Attributes:
        device: the device of the worker that died last.
        exit_code: the process's exit code; negative for the signal that ended it (``-9``: SIGKILL).
        attempts: how many workers died of it.
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


class ClusterError(RerankError):
    """A Dask cluster cannot be used: no scheduler, no workers, or workers that cannot be seats.

    Attributes:
        address: the scheduler's, or that of the worker that cannot be used.
    """

    def __init__(self, message: str, *, address: str = "") -> None:
        super().__init__(message)
        self.address = address
