"""The recipe: what a worker found out about making its model fast, for the workers after it.

A worker that is given none tries each optimization and keeps those that keep the scores. That takes most of its start:
of a worker with XLM-RoBERTa-large's shape 0.4 s are loading and 20 s are proofs. What it found is small. A worker that
is given it applies it, without proofs of its own; the canary, which every worker scores, must then come out as the
first worker's did. So all workers of a deployment compute alike, whatever each would have measured.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Which optimizations a model has, as found by one worker; nothing in it depends on that worker's process.

    Attributes:
        unpadded: its encoder computes no padding.
        cls_only: its last layer computes each pair's first token only.
        prepacked: the names of its linear layers whose weights are prepacked.
        pipeline: texts go to its network by our own pipeline, and not by ``CrossEncoder.predict``.
    """

    unpadded: bool = False
    cls_only: bool = False
    prepacked: tuple[str, ...] = ()
    pipeline: bool = False
