"""vLLM: ``POST /score``, a text against another, or against each of several."""

from __future__ import annotations

import time
from typing import Any

from mp_rerank._checks import shown
from mp_rerank._wire import scores_as_json
from mp_rerank.server.dialects.base import MODEL, OPTIONS, Dialect, options_of, total_tokens
from mp_rerank.server.dialects.rerank import OBJECT_ERROR, object_error
from mp_rerank.server.fields import Field, flag
from mp_rerank.server.models import IDENTITY, SIGMOID, ServedModel
from mp_rerank.server.refusals import Refused
from mp_rerank.server.scoring import Job, Outcome

__all__ = ["Score"]


def _one_or_several(value: Any) -> Any:
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    raise ValueError(f"a string or a list of strings is needed, not {shown(value)}")


def _texts(name: str) -> Field:
    schema = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    return Field(name, _one_or_several, schema, required=True)


class Score(Dialect):
    """vLLM's."""

    name = "score"
    summary = "Score texts against texts, as vLLM does"
    fields = (
        MODEL,
        _texts("text_1"),
        _texts("text_2"),
        flag("use_activation", default=True, about="The sigmoid of the logits, or the logits."),
        *OPTIONS,
    )
    answer_schema = {
        "type": "object",
        "required": ["id", "object", "created", "model", "data", "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string"},
            "created": {"type": "integer"},
            "model": {"type": "string"},
            "data": {
                "type": "array",
                "items": {
                    "type": "object",
                    "required": ["index", "object", "score"],
                    "properties": {
                        "index": {"type": "integer"},
                        "object": {"type": "string"},
                        "score": {"type": ["number", "null", "array"]},
                    },
                },
            },
            "usage": {"type": "object"},
        },
    }
    error_schema = OBJECT_ERROR

    def job(self, values: dict[str, Any]) -> Job:
        left, right = values["text_1"], values["text_2"]
        rights = [right] if isinstance(right, str) else right
        lefts = [left] * len(rights) if isinstance(left, str) else left
        if len(lefts) == 1 and isinstance(left, list):
            lefts = left * len(rights)
        if len(lefts) != len(rights):
            raise Refused(
                "invalid", f"text_1: one text, or as many as text_2 has, {len(rights)}, are needed: not {len(lefts)}"
            )
        return Job(
            pairs=list(zip(lefts, rights, strict=True)),
            model=values["model"],
            activation=SIGMOID if values["use_activation"] else IDENTITY,
            options=options_of(values),
        )

    def answer(self, values: dict[str, Any], job: Job, outcome: Outcome, model: ServedModel, request_id: str) -> Any:
        assert outcome.scores is not None
        tokens = total_tokens(outcome)
        scores = enumerate(scores_as_json(outcome.scores))
        return {
            "id": request_id,
            "object": "list",
            "created": int(time.time()),
            "model": values["model"] or model.name,
            "data": [{"index": index, "object": "score", "score": score} for index, score in scores],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def error(self, refused: Refused, request_id: str) -> Any:
        return object_error(refused, self.status(refused.reason))
