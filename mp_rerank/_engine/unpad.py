"""Encoders without padding: a batch goes through their layers as one row of real tokens, and a few to make it round.

What comes out is laid out as it was for the head, which looks for a pair's first token in the first column.

It is done to encoders that are a module of their own and whose attention goes through transformers' interface, as
BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT and DistilBERT do in transformers 5; any other model stays as it was, and so
does one that would then score differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._engine.parity import keep_if_equal
from mp_rerank._engine.row import NAME, ROUND, Row, laid_out, register_attention

__all__ = ["find_encoder", "unpad"]

#: of the encoder, in the base models of transformers
ENCODERS = ("encoder", "transformer")


def unpad(model: torch.nn.Module, dtype: str, predict: Callable[[], npt.NDArray[np.float32]]) -> bool:
    """Let the encoder within ``model`` leave out padding, if the model then scores the same.

    Args:
        model: a transformers model on a CPU; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it: what must not change.

    Returns:
        Whether it does now.
    """
    encoder = find_encoder(model)
    attention = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if encoder is None or attention != "sdpa" or "forward" in vars(encoder):
        return False
    if not getattr(model, "_can_set_attn_implementation", bool)():  # setting it would do nothing and warn of it
        return False
    unpadded = _Unpadded(encoder)

    def change() -> None:
        register_attention()
        model.set_attn_implementation(NAME)
        encoder.forward = unpadded

    def undo() -> None:
        vars(encoder).pop("forward", None)
        model.set_attn_implementation(attention)

    def predict_unpadded() -> npt.NDArray[np.float32]:
        scores = predict()
        if "forward" in vars(encoder) and not unpadded.used:
            raise ValueError("padding does not get as far as the encoder")
        return scores

    return keep_if_equal("no padding", change, undo, predict_unpadded, dtype)


def find_encoder(model: torch.nn.Module) -> torch.nn.Module | None:
    """The encoder within a transformers model, or ``None``."""
    base = getattr(model, "base_model", None)
    found = next((part for name in ENCODERS if (part := getattr(base, name, None)) is not None), None)
    return found if isinstance(found, torch.nn.Module) else None


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
        row = Row(lengths)
        states = hidden_states[order][real]
        count = len(states)
        rounded = torch.nn.functional.pad(states, (0, 0, 0, -count % ROUND))
        with laid_out(row):
            output = self._forward(rounded.unsqueeze(0), None, **rest)
        tokens = output.last_hidden_state[0]
        padded = torch.zeros_like(hidden_states)
        if row.whole is None:
            padded[real] = tokens[:count]
        else:
            padded[:, 0] = tokens
        output.last_hidden_state = torch.empty_like(padded)
        output.last_hidden_state[order] = padded
        self.used |= count < pairs * longest
        return output
