"""What a dialect makes of a body, a job, and what a model makes of a job: its outcome."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mp_rerank._calls import Asked
from mp_rerank._scheduling.futures import RequestTimes
from mp_rerank.pool import scored_in
from mp_rerank.results import RerankResult, Scores
from mp_rerank.server.models import IDENTITY, SIGMOID, ServedModel

__all__ = ["Job", "Outcome", "activated", "score"]


@dataclass
class Job:
    """What is asked for, whatever the dialect.

    Attributes:
        query, documents: what to rank; or
        pairs: what to score.
        ranking: of documents: whether they are to be ranked, or each is to have its score.
        model: its name; ``None``: the first.
        activation: ``"sigmoid"``, ``"identity"`` (logits), or ``None``: the model's own.
        top_n: how many of the best to give back; ``None``: all.
        min_score: the least score to give back, after the activation; ``None``: any.
        options: keywords of the pool's calls, but for the caller.
    """

    query: str = ""
    documents: Sequence[str] = ()
    pairs: list[tuple[str, str]] | None = None
    ranking: bool = True
    model: str | None = None
    activation: str | None = SIGMOID
    top_n: int | None = None
    min_score: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def texts(self) -> list[str]:
        """All texts in it."""
        if self.pairs is not None:
            return [text for pair in self.pairs for text in pair]
        return [self.query, *self.documents]

    @property
    def size(self) -> int:
        """Its documents, or its pairs."""
        return len(self.documents if self.pairs is None else self.pairs)

    @property
    def characters(self) -> int:
        """Of all texts in it."""
        return sum(map(len, self.texts()))


@dataclass
class Outcome:
    """What came of a job.

    Attributes:
        ranked: places of documents and their scores, best first, of those that are to be given back; ``None`` is not a
            number.
        unscored: documents that were not scored in time (``on_timeout="partial"``).
        scores: of each pair, where no ranking is asked for; NaN for those that were not scored in time.
        results: what the pool said of each document in the order of the documents; none of pairs.
        tokens: the tokens that the model has read; ``None``: not known.
        times: how long it waited and was scored; ``None`` where no worker scored the whole of it.
    """

    ranked: list[tuple[int, float | None]] = field(default_factory=list)
    unscored: int = 0
    scores: Scores | None = None
    results: list[RerankResult] = field(default_factory=list)
    tokens: int | None = None
    times: RequestTimes | None = None


async def score(model: ServedModel, job: Job, caller: str) -> Outcome:
    """Have ``job`` scored; errors as of the pool's calls."""
    activation = job.activation or model.own_activation
    pairs = job.pairs
    if pairs is None and not job.ranking and model.num_labels != 1:
        pairs = [(job.query, document) for document in job.documents]
    options: Any = {**job.options, "caller": caller}
    if pairs is not None:
        scores, times = await scored_in(model.pool, Asked.scores_of(pairs, options))
        return Outcome(scores=activated(scores, activation), times=times)
    results, times = await scored_in(model.pool, Asked.ranking_of(job.query, job.documents, None, options))
    outcome = _ranked(results, job, activation) if job.ranking else _each(results, activation)
    outcome.times = times
    read = [result.tokens for result in results if result.tokens is not None]
    outcome.tokens = sum(read) if read else None
    return outcome


def _each(results: list[RerankResult], activation: str) -> Outcome:
    in_order = sorted(results, key=lambda result: result.index)
    raw = np.array([result.relevance_score for result in in_order], dtype=np.float32)  # None becomes NaN
    return Outcome(scores=activated(raw, activation), results=in_order)


def _ranked(results: list[RerankResult], job: Job, activation: str) -> Outcome:
    there = [result for result in results if result.relevance_score is not None]
    raw = np.array([result.relevance_score for result in there], dtype=np.float32)
    scores = activated(raw, activation).tolist()
    ranked = [(result.index, value) for result, value in zip(there, scores, strict=True)]
    if job.min_score is not None:
        ranked = [(index, value) for index, value in ranked if value >= job.min_score]
    # JSON has no number that is not a number.
    given = [(index, value if math.isfinite(value) else None) for index, value in ranked[: job.top_n]]
    return Outcome(given, len(results) - len(there))


def activated(scores: Scores, activation: str) -> Scores:
    """``scores``, logits, after the activation: float32, computed in float64."""
    if activation == IDENTITY:
        return scores
    positive = np.exp(-np.abs(scores.astype(np.float64)))  # never overflows
    return np.where(scores >= 0, 1.0 / (1.0 + positive), positive / (1.0 + positive)).astype(np.float32)
