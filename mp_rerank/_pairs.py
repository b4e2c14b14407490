"""A pair of texts on its way to its score, which is made once for all the requests that want it.

Two pairs are equal when their texts are, to the letter. Among pending ones that is what is compared. Scores that are
kept for later are kept under digests, so that a kept score takes the same memory however long its document was.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mp_rerank._scheduling.request import Request

__all__ = ["Pair", "PairState", "PendingPair", "Score", "digests"]

Pair = tuple[str, str]
Score = float | list[float]


class PairState(enum.Enum):
    """Where a pending pair is, for all that want it at once."""

    WAITING = "waiting"  # for the turn of any of them
    ALONE = "waiting to be scored in a slice of its own"
    OUT = "out"  # in one slice
    SCORED = "scored"


class PendingPair:
    """A query and a document, until they are scored: the queue's unit of work.

    Attributes:
        key: equal for equal pairs.
        texts: the query and the document.
        tokens: their estimated tokens.
        state: where it is.
        wanted_by: the live requests that want its score, each once.
        attempts: workers that died on it.
        score: once it is scored: a number, or one for each label.
    """

    __slots__ = ("attempts", "key", "score", "state", "texts", "tokens", "wanted_by")

    def __init__(self, key: Hashable, texts: Pair, tokens: int) -> None:
        self.key = key
        self.texts = texts
        self.tokens = tokens
        self.state = PairState.WAITING
        self.wanted_by: list[Request] = []
        self.attempts = 0
        self.score: Score | None = None

    def __repr__(self) -> str:
        return f"<PendingPair: {self.state.value}, wanted by {len(self.wanted_by)}>"


def digests(pairs: Sequence[Pair]) -> list[bytes]:
    """For each pair 128 bits that no other pair has.

    Not quite none: with a million scores kept and a billion asked for, the odds that any is taken for another's are
    3e-24 (the number of such comparisons by 2^128), and texts made to be so take 2^64 trials (BLAKE2b, RFC 7693).
    """
    queries: dict[str, bytes] = {}
    found = []
    for query, document in pairs:
        key = queries.get(query)
        if key is None:
            key = queries[query] = blake2b(query.encode("utf-8", "surrogatepass")).digest()
        found.append(blake2b(document.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest())
    return found
