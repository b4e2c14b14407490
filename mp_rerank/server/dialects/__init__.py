"""Dialects: how clients of other servers say what they want, and what they expect to hear."""

from __future__ import annotations

from mp_rerank.server.dialects.base import Dialect
from mp_rerank.server.dialects.cohere import CohereV2
from mp_rerank.server.dialects.own import OwnPairs
from mp_rerank.server.dialects.rerank import Rerank, RerankV1
from mp_rerank.server.dialects.score import Score
from mp_rerank.server.dialects.tei import Tei

__all__ = ["BY_PATH", "OPEN", "Dialect", "dialect_of"]

_TEI, _RERANK = Tei(), Rerank()

#: which dialects a path has
BY_PATH: dict[str, tuple[Dialect, ...]] = {
    "/rerank": (_TEI, _RERANK),
    "/v1/rerank": (RerankV1(),),
    "/v2/rerank": (CohereV2(),),
    "/score": (Score(),),
    "/v1/score": (Score(),),
    "/pairs": (OwnPairs(),),
}

#: what answers for paths that are no dialect's
OPEN: Dialect = _RERANK


def dialect_of(path: str, body: object) -> Dialect:
    """Which of the path's dialects a body is in: TEI's has ``texts``, the others have ``documents``."""
    found = BY_PATH.get(path, (OPEN,))
    if len(found) > 1 and isinstance(body, dict) and "texts" not in body:
        return found[1]
    return found[0]
