"""Jina, vLLM and Infinity: ``POST /rerank`` with ``documents``; ``POST /v1/rerank`` for these and for Cohere v1."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from mp_rerank.server.dialects.base import (
    COMMON,
    MODEL,
    Dialect,
    document_texts,
    options_of,
    results_schema,
    total_tokens,
)
from mp_rerank.server.fields import documents, flag, strings, text, whole
from mp_rerank.server.models import IDENTITY, SIGMOID, ServedModel
from mp_rerank.server.refusals import Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["OBJECT_ERROR", "Rerank", "RerankV1", "object_error"]

OBJECT_ERROR: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "integer"},
            },
        }
    },
}


def object_error(refused: Refused, status: int) -> dict[str, Any]:
    """An error as OpenAI's clients know it."""
    kind = HTTPStatus(status).phrase.replace(" ", "").replace("-", "") + "Error"
    return {"error": {"message": refused.message, "type": kind, "param": None, "code": status}}


class Rerank(Dialect):
    """Jina's, vLLM's and Infinity's."""

    name = "rerank"
    summary = "Rank documents, as Jina, vLLM and Infinity do"
    fields = (
        MODEL,
        text("query", required=True),
        documents(),
        whole("top_n", 0, about="How many of the best documents to return; all without it."),
        flag("return_documents"),
        flag("raw_scores", default=False, about="Logits, in place of their sigmoid."),
        strings("rank_fields", about="Of documents that are objects: the fields that are their text."),
        *COMMON,
    )
    answer_schema = {
        "type": "object",
        "required": ["id", "model", "results", "usage", "meta"],
        "properties": {
            "id": {"type": "string"},
            "model": {"type": "string"},
            "object": {"type": "string"},
            "results": results_schema(document={"type": "object"}),
            "usage": {"type": "object"},
            "meta": {"type": "object"},
        },
    }
    error_schema = OBJECT_ERROR
    # Whether documents come back where nothing is said of it: Jina, vLLM, not Infinity, nor Cohere.
    returns_documents = True

    def job(self, values: dict[str, Any]) -> Job:
        return Job(
            values["query"],
            document_texts(values["documents"], values["rank_fields"]),
            model=values["model"],
            activation=IDENTITY if values["raw_scores"] else SIGMOID,
            top_n=values["top_n"],
            min_score=values["min_score"],
            options=options_of(values),
        )

    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in outcome.ranked]
        wanted = values["return_documents"]
        if self.returns_documents if wanted is None else wanted:
            for result in results:
                given = values["documents"][result["index"]]
                result["document"] = {"text": given} if isinstance(given, str) else given
        tokens = total_tokens(outcome)
        meta: dict[str, Any] = {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
        if outcome.unscored:
            meta["unscored"] = outcome.unscored
        return {
            "id": request_id,
            "object": "rerank",
            "model": values["model"] or model.name,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": meta,
        }

    def error(self, refused: Refused, request_id: str) -> Any:
        return object_error(refused, self.status(refused.reason))


class RerankV1(Rerank):
    """The same where Cohere v1's clients ask too, who read ``message`` of an error."""

    name = "rerank_v1"
    summary = "Rank documents, as Cohere v1, Jina, vLLM and Infinity do"
    error_schema = {
        **OBJECT_ERROR,
        "required": ["message", "error"],
        "properties": {"message": {"type": "string"}, **OBJECT_ERROR["properties"]},
    }
    returns_documents = False

    def error(self, refused: Refused, request_id: str) -> Any:
        return {"message": refused.message, **super().error(refused, request_id)}
