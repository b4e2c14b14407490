"""Batches: which pairs of a slice go through the network together.

Pairs of about the same length, as many as the budget of tokens allows. What a batch costs depends on the network: some
compute padding, some share what pairs have in common, and of some the padding would change the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from mp_rerank._engine.packed import common_beginning

__all__ = ["equal_batches", "even_batches", "padded_batches", "shared_batches"]


def padded_batches(lengths: list[int], budget: int, overhead: float) -> Iterator[list[int]]:
    """Cut pairs into batches, for a network that computes padding too: so that all take the least time.

    Args:
        lengths: tokens of each pair.
        budget: tokens of one batch, each pair padded to its longest; a longer pair is a batch of its own.
        overhead: of a further batch, as tokens that take as long.

    Yields:
        Indices of ``lengths``, longest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    # From the shortest pair on: what the pairs from ``start`` on cost at least, and where their first batch ends.
    least, ends = [0.0] * (len(order) + 1), [0] * len(order)
    for start in reversed(range(len(order))):
        longest = lengths[order[start]]
        last = min(len(order), start + max(1, budget // longest))
        least[start], ends[start] = min(
            ((stop - start) * longest + overhead + least[stop], stop) for stop in range(start + 1, last + 1)
        )
    start = 0
    while start < len(order):
        yield order[start : ends[start]]
        start = ends[start]


def even_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Cut pairs into batches of about equally many tokens, for a network that computes no padding.

    Args:
        lengths: tokens of each pair.
        budget: tokens that a batch comes as near to as it can.

    Returns:
        Indices of ``lengths``, longest first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [[order[k] for k in batch] for batch in _cut([lengths[i] for i in order], budget)]


def shared_batches(tokens: list[list[int]], budget: int) -> list[list[int]]:
    """Cut pairs into batches of about equally many tokens to compute, for a network that shares common beginnings.

    Args:
        tokens: of each pair.
        budget: tokens that a batch comes as near to as it can; a beginning that its pairs have in common counts once.

    Returns:
        Indices of ``tokens``, pairs that begin alike side by side.
    """
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    shared = [common_beginning(tokens[a], tokens[b]) for a, b in pairwise(order)]
    new = [len(tokens[i]) - common for i, common in zip(order, [0, *shared], strict=True)]
    return [[order[k] for k in batch] for batch in _cut(new, budget)]


def equal_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Cut pairs into batches of one length each, for a network whose scores padding would change.

    Args:
        lengths: tokens of each pair.
        budget: tokens of one batch; a longer pair is a batch of its own.

    Returns:
        Indices of ``lengths``.
    """
    alike: dict[int, list[int]] = {}
    for i, length in enumerate(lengths):
        alike.setdefault(length, []).append(i)
    found = []
    for length, pairs in alike.items():
        size = max(1, budget // length)
        found += [pairs[start : start + size] for start in range(0, len(pairs), size)]
    return found


def _cut(lengths: list[int], budget: int) -> list[list[int]]:
    """Consecutive numbers of ``lengths``, cut so that the sums are about equal and near to ``budget``."""
    total = sum(lengths)
    count = max(1, round(total / budget))
    found: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for i, length in enumerate(lengths):
        found[int((before + length / 2) / total * count)].append(i)
        before += length
    return [batch for batch in found if batch]
