"""Encoders without padding: the pairs of a batch lie end to end, and no layer computes on tokens that are not there.

Linear layers, norms and activations see each token by itself; only attention has to know which of them belong together.
So the encoder gets its batch as one row of real tokens, and its attention, reached through transformers' attention
interface, goes pair by pair, all pairs of one length at once. What comes out is laid out as it was for the head, which
looks for a pair's first token in the first column.

It is done to encoders that are a module of their own and whose attention goes through the interface, as BERT, RoBERTa,
XLM-RoBERTa, ELECTRA, ALBERT and DistilBERT do in transformers 5; any other model stays as it was, and so does one that
would then score differently.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["unpad"]

logger = logging.getLogger(__name__)

#: under which transformers finds the attention below
NAME = "mp_rerank_unpadded"
#: of the encoder, in the base models of transformers
ENCODERS = ("encoder", "transformer")
# Largest difference of a score, absolute and relative: sums in another order differ in their last bits.
TOLERANCE = {"float32": 1e-5, "float64": 1e-5}
TOLERANCE_16_BITS = 0.03

_row = threading.local()  # .runs: of the row that this thread's encoder is at: (start, pairs, tokens of each)


def unpad(model: torch.nn.Module, dtype: str, predict: Callable[[], npt.NDArray[np.float32]]) -> bool:
    """Let the encoder within ``model`` leave out padding, if the model then scores the same.

    Args:
        model: a transformers model on a CPU; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it: what must not change.

    Returns:
        Whether it does now.
    """
    base = getattr(model, "base_model", None)
    encoder = next((found for name in ENCODERS if (found := getattr(base, name, None)) is not None), None)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not isinstance(encoder, torch.nn.Module) or attention != "sdpa" or "forward" in vars(encoder):
        return False
    if not getattr(model, "_can_set_attn_implementation", bool)():  # setting it would do nothing and warn of it
        return False
    unpadded = _Unpadded(encoder)
    tolerance = TOLERANCE.get(dtype, TOLERANCE_16_BITS)
    try:
        before = predict()
        _register()
        model.set_attn_implementation(NAME)
        encoder.forward = unpadded
        after = predict()
        same = unpadded.used and np.allclose(before, after, rtol=tolerance, atol=tolerance)
        if not same:
            logger.debug("without padding it scores %s, not %s", after, before)
    except Exception as error:
        logger.debug("padding cannot be left out here: %s", error)
        same = False
    if not same:
        vars(encoder).pop("forward", None)
        model.set_attn_implementation(attention)
    return same


class _Unpadded:
    """An encoder's ``forward`` in its place: takes a padded batch, hands on one row, returns it padded."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self._forward = encoder.forward
        self.used = False  # whether it has ever left anything out

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **rest: Any) -> Any:
        pairs, longest, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = hidden_states.new_ones((pairs, longest), dtype=torch.bool)
        real = attention_mask.bool()
        lengths, order = real.sum(1).sort()  # those of one length side by side
        real = real[order]
        values, counts = lengths.unique_consecutive(return_counts=True)
        runs, start = [], 0
        for tokens, count in zip(values.tolist(), counts.tolist(), strict=True):
            runs.append((start, count, tokens))
            start += count * tokens
        _row.runs = runs
        try:
            output = self._forward(hidden_states[order][real].unsqueeze(0), None, **rest)
        finally:
            _row.runs = None
        padded = torch.zeros_like(hidden_states)
        padded[real] = output.last_hidden_state[0]
        output.last_hidden_state = torch.empty_like(padded)
        output.last_hidden_state[order] = padded
        self.used |= start < pairs * longest
        return output


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair of the row: three tensors of shape (1, heads, tokens, width)."""
    _, heads, tokens, width = query.shape
    found = query.new_empty(1, tokens, heads, width)
    for start, pairs, length in _row.runs:  # none outside such an encoder: an error, and the model stays as it was
        row = slice(start, start + pairs * length)
        parts = [
            tensor[0, :, row].reshape(heads, pairs, length, width).transpose(0, 1) for tensor in (query, key, value)
        ]
        attended = torch.nn.functional.scaled_dot_product_attention(*parts, scale=scaling)
        found[0, row] = attended.transpose(1, 2).reshape(pairs * length, heads, width)
    return found, None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor | None:
    """The mask as the tokenizer made it, of shape (pairs, longest): the encoder reads lengths from it."""
    return attention_mask


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _mask)
