"""The last layer of an encoder, computed for what the head reads of it: each pair's first token.

A head of BERT's family looks at the first token only. Its last state depends on all others through attention's keys
and values, which are computed for all; queries, attention, and all that follows them, for the first alone. Of the
linear layers' products (of twelve parts, keys and values are two) that leaves out ten twelfths of the last layer: 28 %
of a model with three layers, 14 % with six, 7 % with twelve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._engine.parity import keep_if_equal
from mp_rerank._engine.row import current_row
from mp_rerank._engine.unpad import find_encoder

__all__ = ["read_first"]


def read_first(model: torch.nn.Module, dtype: str, predict: Callable[[], npt.NDArray[np.float32]]) -> bool:
    """Let the last layer within ``model`` leave out what the head does not read, if the model then scores the same.

    Args:
        model: one that `unpad` let leave out padding; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it: what must not change.

    Returns:
        Whether it does now.
    """
    layers = getattr(find_encoder(model), "layer", None)
    if not isinstance(layers, torch.nn.ModuleList) or "forward" in vars(layers[-1]):
        return False
    last = layers[-1]

    def change() -> None:
        last.forward = _FirstOnly(last)

    return keep_if_equal("first tokens only", change, lambda: vars(last).pop("forward", None), predict, dtype)


class _FirstOnly:
    """A layer's ``forward`` in its place: shape (1, tokens, width) to (1, pairs, width)."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._forward = layer.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> Any:
        row = current_row()
        row.whole = hidden_states
        return self._forward(hidden_states[:, row.firsts], *args, **rest)
