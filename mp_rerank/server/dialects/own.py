"""Our own: ``POST /pairs``, which ``mp_rerank.connect`` speaks. Scores exactly as the pool has them."""

from __future__ import annotations

from typing import Any

from mp_rerank._wire import scores_as_json
from mp_rerank.server.dialects.base import COMMON, MODEL, Dialect, options_of
from mp_rerank.server.fields import choice, pairs, strings, text
from mp_rerank.server.models import IDENTITY, SIGMOID, ServedModel
from mp_rerank.server.refusals import Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["OwnPairs"]


class OwnPairs(Dialect):
    """Ours."""

    name = "pairs"
    summary = "Score pairs, or documents against one query, for mp_rerank.connect"
    fields = (
        MODEL,
        text("query"),
        strings("documents", about="Of one query, in place of pairs."),
        pairs(about="Pairs of a query and a document, in any mixture."),
        choice("activation", SIGMOID, IDENTITY, about="The model's own, as CrossEncoder.predict has it, without it."),
        text("prompt_name", about="One of the model's own prompts, in place of an instruction."),
        *(field for field in COMMON if field.name != "min_score"),
    )
    answer_schema = {
        "type": "object",
        "required": ["model", "scores"],
        "properties": {
            "model": {"type": "string"},
            "scores": {"type": "array", "items": {"type": ["number", "null", "array"]}},
            "tokens": {"type": "array", "items": {"type": ["integer", "null"]}},
            "truncated": {"type": "array", "items": {"type": ["boolean", "null"]}},
            "passages": {"type": "array", "items": {"type": ["array", "null"]}},
        },
    }
    error_schema = {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["reason", "message"],
                "properties": {
                    "reason": {"type": "string"},
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "facts": {"type": "object"},
                },
            }
        },
    }

    def job(self, values: dict[str, Any]) -> Job:
        if (values["pairs"] is None) == (values["documents"] is None):
            raise Refused("invalid", "pairs: either these or a query with documents are needed")
        if values["pairs"] is None and values["query"] is None:
            raise Refused("invalid", "query: documents need one")
        return Job(
            values["query"] or "",
            values["documents"] or (),
            values["pairs"],
            ranking=False,
            model=values["model"],
            activation=values["activation"],
            options=options_of(values),
        )

    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        assert outcome.scores is not None
        answer: dict[str, Any] = {"model": model.name, "scores": scores_as_json(outcome.scores)}
        if outcome.tokens is not None:
            answer["tokens"] = [result.tokens for result in outcome.results]
            answer["truncated"] = [result.truncated for result in outcome.results]
        if any(result.passage for result in outcome.results):
            answer["passages"] = [result.passage for result in outcome.results]
        return answer

    def error(self, refused: Refused, request_id: str) -> Any:
        return {"error": {"reason": refused.reason, "message": refused.message, **(refused.said or {})}}
