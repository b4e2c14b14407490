"""A pair: a query and a document. Its types, its estimated length, its digest, and the canary pairs.

**Length.** Planning needs sizes that add up, not exact counts: slices, batches, admission and hang limits. The parent
has no tokenizer (it imports no torch and no transformers), and a batch sorted by an estimated length pads nearly as
little as one sorted by the true length. Scores never depend on the estimate.

**Equality.** Two pairs are equal when their texts are, to the letter. Pending pairs are compared by their texts. Kept
scores are found by digests, so that each takes the same memory however long its document was.

**Canary.** Pairs that every worker scores after it has loaded its model. `TOLERANCES` says how far two scores of one
pair may differ, wherever scores are compared.

A worker imports this before its threads are set, so it imports nothing heavy: no numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

__all__ = ["CANARY", "TOLERANCES", "Pair", "Score", "digests", "estimate_pair", "estimate_text", "tolerance"]

Pair = tuple[str, str]
#: of one pair: a number, or one for each label
Score = float | list[float]

# English prose is 4 to 5 characters a WordPiece or BPE token; text outside ASCII is nearer to one token for 3 bytes of
# UTF-8 (one CJK character, one and a half of Cyrillic or accented Latin).
ASCII_CHARACTERS_A_TOKEN = 4
UTF8_BYTES_A_TOKEN = 3
# [CLS] query [SEP] document [SEP]
SPECIAL_TOKENS = 3

# Two workers whose scores of these differ do not hold the same model. The long one makes the first measure of a
# worker's speed less of a guess.
CANARY: list[Pair] = [
    ("How many people live in Berlin?", "Berlin had a population of 3,520,031 registered inhabitants."),
    ("How many people live in Berlin?", "Berlin is well known for its museums. " * 20),
]

# How far two scores of one pair may differ, absolute and relative (the atol and rtol of ``numpy.allclose``), by what is
# different about how they were made: in float32, and in 16 bits.
TOLERANCES = {
    "same network": (1e-5, 1e-5),  # called by other code
    "optimized": (1e-5, 3e-2),  # sums in another order differ in their last bits
    "another worker": (1e-5, 5e-3),
    "another device": (5e-2, 5e-2),
    "another runtime": (1e-4, 3e-2),  # compared in float32 only
}


def tolerance(what: str, dtype: str) -> float:
    """The entry of ``TOLERANCES`` for weights of ``dtype`` (empty where a loader's model does not say: float32)."""
    in_float32, in_16_bits = TOLERANCES[what]
    return in_float32 if dtype in ("", "float32", "float64") else in_16_bits


def estimate_text(text: str) -> int:
    """Estimated tokens of ``text``, at least 1."""
    if text.isascii():
        return len(text) // ASCII_CHARACTERS_A_TOKEN + 1
    return len(text.encode("utf-8", "surrogatepass")) // UTF8_BYTES_A_TOKEN + 1


def estimate_pair(query_tokens: int, document: str, max_length: int | None) -> int:
    """Estimated tokens of a pair whose query is ``query_tokens`` long, after truncation to ``max_length``."""
    tokens = query_tokens + estimate_text(document) + SPECIAL_TOKENS
    return tokens if max_length is None else min(tokens, max_length)


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
