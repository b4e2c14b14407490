"""Cohere v2: ``POST /v2/rerank``."""

from __future__ import annotations

import math
from typing import Any

from mp_rerank._arguments import MAX_PRIORITY
from mp_rerank.server.dialects.base import (
    MODEL,
    OPTIONS,
    Dialect,
    document_texts,
    options_of,
    results_schema,
    total_tokens,
)
from mp_rerank.server.fields import documents, number, text, whole
from mp_rerank.server.models import ServedModel
from mp_rerank.server.refusals import Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["CohereV2"]

LOWEST = 999


class CohereV2(Dialect):
    """Cohere's second."""

    name = "cohere_v2"
    summary = "Rank documents, as Cohere v2 does"
    fields = (
        MODEL,
        text("query", required=True),
        documents(),
        whole("top_n", 1, about="How many of the best documents to return; all without it."),
        whole("priority", 0, LOWEST, about="Lower is earlier; each 125 halve the request's share of its caller's."),
        number("min_score", about="The least score of a document that is returned."),
        *OPTIONS,
    )
    answer_schema = {
        "type": "object",
        "required": ["id", "results", "meta"],
        "properties": {
            "id": {"type": "string"},
            "results": results_schema(),
            "meta": {"type": "object"},
        },
    }
    error_schema = {
        "type": "object",
        "required": ["id", "message"],
        "properties": {"id": {"type": "string"}, "message": {"type": "string"}},
    }

    def job(self, values: dict[str, Any]) -> Job:
        if not values["documents"]:
            raise Refused("empty", "invalid request: list of documents must not be empty")
        options = options_of({**values, "priority": None})
        if values["priority"]:
            options["priority"] = -math.ceil(values["priority"] * MAX_PRIORITY / LOWEST)
        return Job(
            values["query"],
            document_texts(values["documents"]),
            model=values["model"],
            top_n=values["top_n"],
            min_score=values["min_score"],
            options=options,
        )

    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        meta: dict[str, Any] = {
            "api_version": {"version": "2"},
            "billed_units": {"search_units": 1},
            "tokens": {"input_tokens": total_tokens(outcome), "output_tokens": 0},
        }
        if outcome.unscored:
            meta["warnings"] = [f"{outcome.unscored} documents were not scored in time"]
        results = [{"index": index, "relevance_score": score} for index, score in outcome.ranked]
        return {"id": request_id, "results": results, "meta": meta}

    def error(self, refused: Refused, request_id: str) -> Any:
        return {"id": request_id, "message": refused.message}
