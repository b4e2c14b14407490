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
#: what BERT's and DistilBERT's kin call the layers that make keys and values
PROJECTIONS = (("key", "value"), ("k_lin", "v_lin"))

_here = threading.local()  # .row: of the batch that this thread's encoder is at


@dataclass
class Row:
    """What the row is made of.

    Attributes:
        runs: pairs of one length side by side, in the row's order: (how many pairs, tokens of each). Behind the last
            there may be tokens that mean nothing, to make the row's length a round one.
        whole: hidden states of all tokens, shape (1, tokens, width), while a layer is given only those of each pair's
            first token; its attention takes keys and values from these.
    """

    runs: list[tuple[int, int]]
    whole: torch.Tensor | None = None

    def first_tokens(self) -> list[int]:
        """Where in the row each pair begins."""
        places: list[int] = []
        start = 0
        for pairs, length in self.runs:
            places += range(start, start + pairs * length, length)
            start += pairs * length
        return places


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
    found = query.new_empty(1, asking, heads, width)
    to_query = to_key = 0
    for pairs, length in row.runs:
        from_query, to_query = to_query, to_query + pairs * (length if row.whole is None else 1)
        from_key, to_key = to_key, to_key + pairs * length
        parts = [
            tensor[0, :, start:end].reshape(heads, pairs, -1, width).transpose(0, 1)
            for tensor, start, end in (
                (query, from_query, to_query),
                (key, from_key, to_key),
                (value, from_key, to_key),
            )
        ]
        attended = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling)
        found[0, from_query:to_query] = attended.transpose(1, 2).reshape(-1, heads, width)
    found[0, to_query:] = 0
    return found, None


def _projections(attention: torch.nn.Module) -> list[torch.nn.Module]:
    return next(
        [attention.get_submodule(name) for name in names] for names in PROJECTIONS if hasattr(attention, names[0])
    )


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor | None:
    """The mask as the tokenizer made it, of shape (pairs, longest): the encoder reads lengths from it."""
    return attention_mask
