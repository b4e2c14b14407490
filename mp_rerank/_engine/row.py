"""A batch as one row of tokens, its pairs end to end without padding, and attention that goes pair by pair.

Linear layers, norms and activations see each token by itself; only attention has to know which of them belong together.
It is reached through transformers' attention interface, and finds what the row is made of here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["NAME", "ROUND", "Row", "current_row", "laid_out", "register_attention"]

#: under which transformers finds the attention below
NAME = "mp_rerank_row"
#: Tokens are computed on in multiples of this. oneDNN makes a kernel for every number of them and keeps it, and memory
#: of ever new sizes falls into pieces: with a model of 18 MB a worker had 760 MB more after 600 batches, and has 100.
ROUND = 32
#: Places of a pair in attention are a multiple of this: what is left over of a vector register is computed one by one,
#: which takes twice as long for 31 or 63 tokens as for 32 or 64.
MULTIPLE = 16
#: what BERT's and DistilBERT's kin call the layers that make keys and values
PROJECTIONS = (("key", "value"), ("k_lin", "v_lin"))

_here = threading.local()  # .row: of the batch that this thread's encoder is at


@dataclass(frozen=True)
class Block:
    """Pairs of about one length, as attention takes them: each in as many places, a multiple of `MULTIPLE`.

    Attributes:
        pairs: which of the row's pairs.
        span: which of its tokens, from the first pair's first to the last one's last.
        places: of each pair.
        tokens: which token of the row is in which place; in those left over, any. Shape (pairs * places,).
        taken: the places that are not left over, in the row's order. Shape (tokens in the span,).
        mask: which places may be attended to, shape (pairs, 1, 1, places); ``None`` where none is left over.
    """

    pairs: slice
    span: slice
    places: int
    tokens: torch.Tensor
    taken: torch.Tensor
    mask: torch.Tensor | None


class Row:
    """What the row is made of.

    Args:
        lengths: tokens of each pair, in the row's order, in which they grow. Behind the last pair there may be tokens
            that mean nothing, to make the row's length a round one.

    Attributes:
        firsts: where in the row each pair begins.
        blocks: what the row falls into.
        whole: hidden states of all tokens, shape (1, tokens, width), while a layer is given only those of each pair's
            first token; its attention takes keys and values from these.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        ends = lengths.cumsum(0)
        self.firsts = ends - lengths
        self.whole: torch.Tensor | None = None
        self.blocks: list[Block] = []
        rounded = -(-lengths // MULTIPLE) * MULTIPLE
        begin = 0
        sizes, counts = rounded.unique_consecutive(return_counts=True)
        for places, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            pairs = slice(begin, begin + count)
            begin += count
            firsts, numbers = self.firsts[pairs, None], torch.arange(places)
            mask = numbers < lengths[pairs, None]
            self.blocks.append(
                Block(
                    pairs=pairs,
                    span=slice(int(firsts[0]), int(ends[pairs][-1])),
                    places=places,
                    tokens=torch.where(mask, firsts + numbers, firsts).flatten(),
                    taken=mask.flatten().nonzero()[:, 0],
                    mask=None if bool(mask.all()) else mask[:, None, None, :],
                )
            )


def current_row() -> Row:
    """The row this thread's encoder is at; outside one, ``AttributeError``."""
    row: Row = _here.row
    return row


@contextmanager
def laid_out(row: Row) -> Iterator[None]:
    """Within, attention goes by ``row``."""
    _here.row = row
    try:
        yield
    finally:
        del _here.row


def register_attention() -> None:
    """Let models of transformers find this attention, and a mask for it, under ``NAME``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair: tensors of shape (1, heads, tokens, width) to one of (1, tokens, heads, width)."""
    row = current_row()
    _, heads, asking, width = query.shape
    if row.whole is not None:
        key, value = (project(row.whole).view(1, -1, heads, width).transpose(1, 2) for project in _projections(module))
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    found = query.new_zeros(asking, heads, width)
    for block in row.blocks:
        shape = -1, block.places, heads, width
        ask = queries.index_select(0, block.tokens).view(shape) if row.whole is None else queries[block.pairs, None]
        attended = torch.nn.functional.scaled_dot_product_attention(
            ask.transpose(1, 2),
            keys.index_select(0, block.tokens).view(shape).transpose(1, 2),
            values.index_select(0, block.tokens).view(shape).transpose(1, 2),
            attn_mask=block.mask,
            scale=scaling,
        )
        answers = attended.transpose(1, 2).reshape(-1, heads, width)
        if row.whole is None:
            found[block.span] = answers.index_select(0, block.taken)
        else:
            found[block.pairs] = answers
    return found[None], None


def _projections(attention: torch.nn.Module) -> list[torch.nn.Module]:
    return next(
        [attention.get_submodule(name) for name in names] for names in PROJECTIONS if hasattr(attention, names[0])
    )


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor | None:
    """The mask as the tokenizer made it, of shape (pairs, longest): the encoder reads lengths from it."""
    return attention_mask
