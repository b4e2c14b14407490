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
        unpadded: it computes no padding.
        attends_in_tiles: its attention is computed by the kernel for CPUs with AMX.
        fewer_passes: its norms, rotations and gates are computed in fewer passes over memory.
        shares_beginnings: what pairs of a batch have in common at their beginnings is computed once.
        head_only: its last layer computes only the token of each pair that the head reads.
        score_logits: of a vocabulary's logits only those are computed that the score is made of.
        prepacked: the names of its linear layers whose weights are prepacked.
        amx: those are computed in AMX tiles, by kernels of this package. Informs only: each worker sees for itself.
        computes_together: layers that stand together are computed together, in those tiles.
        whole_layers: each of its layers but the last is one function, which calls those kernels itself.
        pipeline: how texts become tokens without ``CrossEncoder.predict``: by the tokens of ``"words"``, by the
            tokenizer's ``"backend"``, by the ``"tokenizer"``, or by the library's ``"preprocess"``; empty: pairs go
            through ``predict``.
        cuda_graphs: a batch on a GPU is one row, computed by a CUDA graph for its size. Its head reads each pair's
            ``"first"`` or ``"last"`` token; empty: there are none.
        equal_lengths: padding would change its scores, so that a batch is of pairs of one length.
    """

    unpadded: bool = False
    attends_in_tiles: bool = False
    fewer_passes: bool = False
    shares_beginnings: bool = False
    head_only: bool = False
    score_logits: bool = False
    prepacked: tuple[str, ...] = ()
    amx: bool = False
    computes_together: bool = False
    whole_layers: bool = False
    pipeline: str = ""
    cuda_graphs: str = ""
    equal_lengths: bool = False

    def names(self) -> tuple[str, ...]:
        """The optimizations that are on, as ``WorkerInfo.optimizations`` has them."""
        return tuple(
            name
            for name in (
                "pipeline",
                "cuda_graphs",
                "unpadded",
                "attends_in_tiles",
                "fewer_passes",
                "shares_beginnings",
                "head_only",
                "score_logits",
                "prepacked",
                "amx",
                "computes_together",
                "whole_layers",
            )
            if getattr(self, name)
        )
