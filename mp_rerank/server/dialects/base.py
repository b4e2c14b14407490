"""What each dialect has, and the fields that are this server's own in all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from mp_rerank._arguments import MAX_PRIORITY, TEXT_KEY
from mp_rerank.server.fields import Field, choice, number, read, text, whole
from mp_rerank.server.models import ServedModel
from mp_rerank.server.refusals import STATUSES, Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["COMMON", "MODEL", "OPTIONS", "Dialect", "document_texts", "options_of", "results_schema", "total_tokens"]

#: fields that dialects share
MODEL = text("model", about="Which of the server's models; the first without it.")

_TIMEOUT = number("timeout", above=0, about="Seconds from now until the request expires.")
_ON_TIMEOUT = choice(
    "on_timeout",
    "raise",
    "partial",
    default="raise",
    about="What becomes of a request that expires: an error, or what has been scored by then.",
)
_PRIORITY = whole(
    "priority",
    -MAX_PRIORITY,
    MAX_PRIORITY,
    about="Each step doubles the request's share of what its caller gets.",
)

_INSTRUCTION = text("instruction", about="What to judge by, in words; the model's own without it.")
MAX_TOKENS_PER_DOC = whole("max_tokens_per_doc", 1, about="How much of a document may be read, in its own tokens.")
_TRUNCATION = choice(
    "truncation",
    "end",
    "start",
    "error",
    about="What is cut off of a document that is too long, or an error.",
)
_LONG_DOCUMENTS = choice(
    "long_documents",
    "truncate",
    "chunk",
    about="What becomes of a document that is too long: it is cut, or divided, and its best part counts.",
)

#: options of the pool's calls that every dialect has
OPTIONS: tuple[Field, ...] = (
    _TIMEOUT,
    _ON_TIMEOUT,
    _INSTRUCTION,
    MAX_TOKENS_PER_DOC,
    _TRUNCATION,
    _LONG_DOCUMENTS,
)
#: with what the dialects of ranking have beside them
COMMON: tuple[Field, ...] = (
    *OPTIONS,
    _PRIORITY,
    number("min_score", about="The least score of a document that is returned."),
)
# Of the pool's calls, and so of fields.
NAMES = (
    "timeout",
    "on_timeout",
    "priority",
    "instruction",
    "prompt_name",
    "max_tokens_per_doc",
    "truncation",
    "long_documents",
)


class Dialect(ABC):
    """One dialect.

    Attributes:
        name: in logs, metrics and OpenAPI.
        summary: for OpenAPI.
        fields: of a body.
        statuses: where they differ from ``STATUSES``.
        answer_schema, error_schema: JSON Schema of what is answered.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    fields: ClassVar[tuple[Field, ...]]
    statuses: ClassVar[dict[str, int]] = {}
    answer_schema: ClassVar[dict[str, Any]]
    error_schema: ClassVar[dict[str, Any]]

    def parse(self, body: object) -> tuple[dict[str, Any], Job]:
        """The values of the fields in ``body``, and the job they make; raises `Refused`."""
        values = read(self.fields, body)
        return values, self.job(values)

    @abstractmethod
    def job(self, values: dict[str, Any]) -> Job:
        """The job that ``values`` describe; raises `Refused`."""

    @abstractmethod
    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        """The body of the answer."""

    def status(self, reason: str) -> int:
        """The status of a refusal."""
        return self.statuses.get(reason, STATUSES[reason])

    @abstractmethod
    def error(self, refused: Refused, request_id: str) -> Any:
        """The body of a refusal."""


def results_schema(**more: Any) -> dict[str, Any]:
    """JSON Schema of a ranking; ``more`` are what else its items may have."""
    properties = {"index": {"type": "integer"}, "relevance_score": {"type": "number"}, **more}
    items = {"type": "object", "required": ["index", "relevance_score"], "properties": properties}
    return {"type": "array", "items": items}


def options_of(values: dict[str, Any]) -> dict[str, Any]:
    """Keywords of the pool's calls that ``values`` hold: those that are there."""
    return {name: values[name] for name in NAMES if values.get(name) is not None}


def document_texts(documents: Sequence[Any], rank_fields: Sequence[str] | None = None) -> list[str]:
    """The text of each document: itself, or of an object its ``text``, or what ``rank_fields`` name, a line each."""
    texts = []
    for place, document in enumerate(documents):
        if isinstance(document, str):
            texts.append(document)
        elif rank_fields:
            texts.append("\n".join(f"{name}: {document[name]}" for name in rank_fields if name in document))
        elif isinstance(document.get(TEXT_KEY), str):
            texts.append(document[TEXT_KEY])
        else:
            raise Refused("invalid", f"documents[{place}]: an object needs its text under {TEXT_KEY!r}, a string")
    return texts


def total_tokens(outcome: Outcome) -> int:
    """The tokens that an answer names; 0 where they are not known."""
    return outcome.tokens or 0
