"""How much a worker is given at a time: a full slice, or less, so that all workers end at about one time.

A worker's part of all that there is to score is cut into equal slices, as few as hold it. Of three full slices for two
workers, the last would keep one of them waiting for a third of the time. Pure: numbers in, a number out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["next_tokens"]


def next_tokens(waiting: int, own: float | None, others: Sequence[float | None], full: int, least: int) -> int:
    """Tokens of a worker's next slice, at most ``full``.

    Args:
        waiting: tokens that no worker has.
        own: what the worker has yet to score; ``None``: it has nothing to do.
        others: the same of the other workers.
        full: tokens of a full slice.
        least: to send fewer takes longer than to score them with others.
    """
    of_each = (waiting + sum(left or 0.0 for left in (own, *others))) / (1 + len(others))
    if own is None:
        # What is left to those who score is theirs, unless it is crumbs; those who have nothing share the rest.
        missing = [of_each - left for left in others if left is not None]
        rest = waiting - sum(tokens for tokens in missing if tokens > least)
        part = rest / (1 + others.count(None))
    else:
        part = of_each - own
    part = max(1.0, part)
    tokens = max(least, math.ceil(part / math.ceil(part / full)))
    return min(full, waiting if waiting - tokens < least else tokens)
