"""What a client and a server of this package say to each other: errors and scores, as JSON."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mp_rerank import errors
from mp_rerank.results import Scores

__all__ = [
    "CALLER_HEADER",
    "REQUEST_ID_HEADER",
    "error_as_json",
    "error_from_json",
    "scores_as_json",
    "scores_from_json",
]

CALLER_HEADER = "x-caller"
REQUEST_ID_HEADER = "x-request-id"

# What stays in the server's log: a traceback tells of its files. Notes (Python 3.11) are made anew by the client.
KEPT_BACK = {"details", "__notes__"}


def error_as_json(error: errors.RerankError) -> dict[str, Any]:
    """An error of the pool: its class, its message and its facts."""
    facts = {name: value for name, value in vars(error).items() if name not in KEPT_BACK}
    return {"type": type(error).__name__, "message": str(error), "facts": facts}


def error_from_json(said: Any) -> errors.RerankError | None:
    """The error that ``error_as_json`` described; ``None``: it is none that this version knows."""
    if not isinstance(said, dict) or said.get("type") not in errors.__all__:
        return None
    made: errors.RerankError = getattr(errors, said["type"])(str(said.get("message", "")))
    given = said.get("facts")
    facts: dict[str, Any] = given if isinstance(given, dict) else {}
    for name in set(vars(made)) & set(facts):
        setattr(made, name, facts[name])
    if "details" in vars(made):
        made.details = vars(made).get("cause", "")  # type: ignore[attr-defined]
    return made


def scores_as_json(scores: Scores) -> list[Any]:
    """``scores`` as lists of numbers, exactly; ``None`` for one that is not a number, or is not there."""
    return [_number(score) for score in scores.tolist()]


def scores_from_json(said: list[Any], num_labels: int) -> tuple[Scores, npt.NDArray[np.bool_]]:
    """The scores, shape (n,) or (n, num_labels), and a mask of which are there."""
    scores = np.array(said, dtype=np.float32)  # None becomes NaN
    if num_labels > 1:
        scores = scores.reshape(-1, num_labels)
    return scores, ~np.isnan(scores if scores.ndim == 1 else scores[:, 0])


def _number(score: Any) -> Any:
    if isinstance(score, list):
        return [_number(inner) for inner in score]
    return score if math.isfinite(score) else None
