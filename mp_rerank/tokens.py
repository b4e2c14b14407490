"""How long a text is, in tokens, without a tokenizer: the one measure of size for planning work.

Slices, batches, admission and hang limits need sizes that add up, not exact counts: the parent has no tokenizer (it
imports no torch and no transformers), and a batch sorted by a rough length pads nearly as little as one sorted by the
true one. Scores never depend on it.
"""

from __future__ import annotations

__all__ = ["estimate_pair", "estimate_text"]

# English prose is 4 to 5 characters a WordPiece or BPE token; text outside ASCII is nearer to one token for 3 bytes of
# UTF-8 (one CJK character, one and a half of Cyrillic or accented Latin).
ASCII_CHARACTERS_A_TOKEN = 4
UTF8_BYTES_A_TOKEN = 3
# [CLS] query [SEP] document [SEP]
SPECIAL_TOKENS = 3


def estimate_text(text: str) -> int:
    """Estimated tokens of ``text``, at least 1."""
    if text.isascii():
        return len(text) // ASCII_CHARACTERS_A_TOKEN + 1
    return len(text.encode("utf-8", "surrogatepass")) // UTF8_BYTES_A_TOKEN + 1


def estimate_pair(query_tokens: int, document: str, max_length: int | None) -> int:
    """Estimated tokens of a pair whose query is ``query_tokens`` long, after truncation to ``max_length``."""
    tokens = query_tokens + estimate_text(document) + SPECIAL_TOKENS
    return tokens if max_length is None else min(tokens, max_length)
