"""Why a request is refused, in a word that each dialect has a status and a body for."""

from __future__ import annotations

from mp_rerank._text import one_line
from mp_rerank._wire import error_as_json
from mp_rerank.errors import (
    ModelLoadError,
    PoolClosedError,
    PoolOverloadedError,
    RequestTimeoutError,
    RerankError,
    ScoringError,
    TextTooLongError,
    WorkerCrashedError,
)

__all__ = ["STATUSES", "Refused", "refused_of"]

#: a status for each reason; dialects differ from it where their clients expect another
STATUSES = {
    "malformed": 400,  # no JSON
    "invalid": 400,  # a field is missing, or is not what it should be
    "empty": 400,  # no documents
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "not_allowed": 405,
    "slow": 408,  # the body did not come
    "too_large": 413,  # the body
    "too_many": 413,  # documents or characters
    "too_long": 400,  # a document, for a request that wants none cut off
    "media_type": 415,
    "overloaded": 429,
    "bug": 500,
    "scoring": 500,  # the model raised on a document
    "crashed": 500,  # a document ended its workers
    "unavailable": 503,  # loading, leaving, or failed
    "timeout": 504,
}


class Refused(Exception):  # noqa: N818  # it is no defect
    """A request gets an error.

    Attributes:
        reason: a key of ``STATUSES``.
        message: for the user; one line.
        retry_after: seconds after which it may be tried again; ``None``: it would be refused again.
        said: the pool's error, as a client of this package reads it; ``None``: it is none of the pool's.
    """

    def __init__(
        self, reason: str, message: str, *, retry_after: int | None = None, said: dict[str, object] | None = None
    ) -> None:
        super().__init__(one_line(message))
        self.reason = reason
        self.message = one_line(message)
        self.retry_after = retry_after
        self.said = said


def refused_of(error: RerankError | TypeError | ValueError) -> Refused:
    """What an error of the pool's calls is to those who ask over HTTP."""
    said = error_as_json(error) if isinstance(error, RerankError) else None
    text = str(error)
    if isinstance(error, TextTooLongError):
        return Refused("too_long", text, said=said)
    if isinstance(error, (TypeError, ValueError)):
        return Refused("invalid", text)
    if isinstance(error, RequestTimeoutError):
        return Refused("timeout", text, said=said)
    if isinstance(error, PoolOverloadedError):
        return Refused("overloaded", text, retry_after=1, said=said)
    if isinstance(error, ScoringError):
        return Refused("scoring", text, said=said)
    if isinstance(error, WorkerCrashedError):
        # Without a document to blame it is that no worker is left.
        if error.document_index is None:
            return Refused("unavailable", text, said=said)
        return Refused("crashed", text, said=said)
    if isinstance(error, (PoolClosedError, ModelLoadError)):
        return Refused("unavailable", text, retry_after=1 if isinstance(error, PoolClosedError) else None, said=said)
    return Refused("bug", text, said=said)
