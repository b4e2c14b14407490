"""Text-embeddings-inference: ``POST /rerank`` with ``texts``; the answer is an array."""

from __future__ import annotations

from typing import Any

from mp_rerank.server.dialects.base import COMMON, MODEL, Dialect, options_of
from mp_rerank.server.fields import choice, flag, strings, text
from mp_rerank.server.models import IDENTITY, SIGMOID, ServedModel
from mp_rerank.server.refusals import Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["Tei"]

TYPES = {
    "empty": "Empty",
    "overloaded": "Overloaded",
    "unavailable": "Unhealthy",
    "bug": "Backend",
    "scoring": "Backend",
    "crashed": "Backend",
    "timeout": "Backend",
}


def _truncation(values: dict[str, Any]) -> dict[str, Any]:
    """TEI refuses a text that is too long if it is told not to truncate; told nothing, it truncates."""
    if values["truncate"] is False:
        return {"truncation": "error"}
    return {"truncation": "start"} if values["truncation_direction"] == "Left" else {}


class Tei(Dialect):
    """TEI's."""

    name = "tei"
    summary = "Rank texts, as text-embeddings-inference does"
    fields = (
        text("query", required=True),
        strings("texts", required=True),
        flag("raw_scores", default=False, about="Logits, in place of their sigmoid."),
        flag("return_text", default=False),
        flag("truncate"),
        choice("truncation_direction", "Right", "Left", default="Right"),
        MODEL,
        *COMMON,
    )
    statuses = {"malformed": 400, "invalid": 422, "too_long": 413, "scoring": 424, "crashed": 424}
    answer_schema = {
        "type": "array",
        "items": {
            "type": "object",
            "required": ["index", "score"],
            "properties": {
                "index": {"type": "integer"},
                "score": {"type": "number"},
                "text": {"type": "string"},
            },
        },
    }
    error_schema = {
        "type": "object",
        "required": ["error", "error_type"],
        "properties": {"error": {"type": "string"}, "error_type": {"type": "string"}},
    }

    def job(self, values: dict[str, Any]) -> Job:
        if not values["texts"]:
            raise Refused("empty", "`texts` cannot be empty")
        return Job(
            values["query"],
            values["texts"],
            model=values["model"],
            activation=IDENTITY if values["raw_scores"] else SIGMOID,
            min_score=values["min_score"],
            options={**_truncation(values), **options_of(values)},
        )

    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        ranks: list[dict[str, Any]] = [{"index": index, "score": score} for index, score in outcome.ranked]
        if values["return_text"]:
            for rank in ranks:
                rank["text"] = values["texts"][rank["index"]]
        return ranks

    def error(self, refused: Refused, request_id: str) -> Any:
        return {"error": refused.message, "error_type": TYPES.get(refused.reason, "Validation")}
