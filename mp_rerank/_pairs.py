"""A pair: a query and a document. How it is read, its estimated length, its digest, and the canary pairs.

**Reading.** `PairOptions` say how a pair becomes tokens, and so are a part of what its score depends on. `Reading` is
what a model then read of it.

**Length.** Planning needs sizes that add up, not exact counts: slices, batches, admission and hang limits. The parent
has no tokenizer (it imports no torch and no transformers), and a batch sorted by an estimated length pads nearly as
little as one sorted by the true length. Scores never depend on the estimate.

**Equality.** Two pairs are equal when their texts are, to the letter, and their options. Pending pairs are compared by
these. Kept scores are found by digests, so that each takes the same memory however long its document was.

**Canary.** Pairs that every worker scores after it has loaded its model. `TOLERANCES` says how far two scores of one
pair may differ, wherever scores are compared.

A worker imports this before its threads are set, so it imports nothing heavy: no numpy.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple

__all__ = [
    "CANARY",
    "PLAIN",
    "TOLERANCES",
    "LongDocuments",
    "Pair",
    "PairOptions",
    "Reading",
    "Readings",
    "Score",
    "Truncation",
    "digests",
    "estimate_pair",
    "estimate_text",
    "tolerance",
]

Pair = tuple[str, str]
#: of one pair: a number, or one for each label
Score = float | list[float]

Truncation = Literal["end", "start", "error"]
LongDocuments = Literal["truncate", "chunk"]


class PairOptions(NamedTuple):
    """How a pair becomes what a model reads. By default as ``CrossEncoder.predict`` has it.

    Attributes:
        prompt: goes before the query, or into the chat template's system turn, as ``predict(prompt=...)`` has it.
        max_tokens_per_doc: the longest a document may be, in tokens of its own; ``None``: as long as the model takes.
        truncation: which end of too long a document is cut off, or ``"error"``.
        long_documents: ``"chunk"``: what is too long for the model is scored in chunks, and the best one counts.
    """

    prompt: str | None = None
    max_tokens_per_doc: int | None = None
    truncation: Truncation = "end"
    long_documents: LongDocuments = "truncate"


#: the options of a pair that none were asked for
PLAIN = PairOptions()


class Reading(NamedTuple):
    """What a model read of a pair.

    Attributes:
        tokens: how many, the query's and special ones included; of all chunks together.
        truncated: whether something of the pair was cut off.
        passage: where in the document the chunk with the best score is: its start and end, in characters. ``None``: the
            document was not divided.
    """

    tokens: int
    truncated: bool
    passage: tuple[int, int] | None = None


@dataclass(frozen=True)
class Readings:
    """What a model read of each of n pairs; light to pickle.

    Attributes:
        tokens, truncated: of each pair, as in `Reading`; ``truncated`` is a byte each, 0 or 1.
        passages: of those that were divided.
        too_long: those that are longer than they may be, and have no score: their tokens, and how many are allowed.
    """

    tokens: array[int]
    truncated: bytearray
    passages: dict[int, tuple[int, int]] = field(default_factory=dict)
    too_long: dict[int, tuple[int, int]] = field(default_factory=dict)

    def of(self, index: int) -> Reading:
        """The reading of the pair at ``index``."""
        return Reading(self.tokens[index], bool(self.truncated[index]), self.passages.get(index))


# English prose is 4 to 5 characters a WordPiece or BPE token; text outside ASCII is nearer to one token for 3 bytes of
# UTF-8 (one CJK character, one and a half of Cyrillic or accented Latin).
ASCII_CHARACTERS_A_TOKEN = 4
UTF8_BYTES_A_TOKEN = 3
# [CLS] query [SEP] document [SEP]
SPECIAL_TOKENS = 3
# Chunks of a document share an eighth with their neighbours, and each has the query.
CHUNK_OVERHEAD = 1.25

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


def estimate_pair(query_tokens: int, document: str, max_length: int | None, options: PairOptions = PLAIN) -> int:
    """Estimated tokens of a pair whose query is ``query_tokens`` long, prompt included, read by ``options``.

    Args:
        max_length: the longest pair that the model reads; ``None``: any.
    """
    tokens = estimate_text(document)
    if options.max_tokens_per_doc is not None:
        tokens = min(tokens, options.max_tokens_per_doc)
    overhead = query_tokens + SPECIAL_TOKENS
    if max_length is None or overhead + tokens <= max_length:
        return overhead + tokens
    if options.long_documents == "truncate":
        return max_length
    room = max(max_length - overhead, max_length // 4)
    return int(tokens / room * max_length * CHUNK_OVERHEAD)


def digests(pairs: Sequence[Pair], options: PairOptions = PLAIN) -> list[bytes]:
    """For each pair, read by ``options``, 128 bits that no other pair has.

    Not quite none: with a million scores kept and a billion asked for, the odds that any is taken for another's are
    3e-24 (the number of such comparisons by 2^128), and texts made to be so take 2^64 trials (BLAKE2b, RFC 7693).
    """
    queries: dict[str, bytes] = {}
    found = []
    how = b"" if options == PLAIN else repr(options).encode("utf-8", "backslashreplace")
    for query, document in pairs:
        key = queries.get(query)
        if key is None:
            key = queries[query] = blake2b(query.encode("utf-8", "surrogatepass"), key=blake2b(how).digest()).digest()
        found.append(blake2b(document.encode("utf-8", "surrogatepass"), key=key, digest_size=16).digest())
    return found
