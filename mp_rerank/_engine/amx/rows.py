"""Norms of rows and rotary positions, in one pass over memory each, computed in float32: see ``rows.cpp``."""

from __future__ import annotations

import torch

from mp_rerank._engine.amx.library import DTYPES, find_library, is_wide

__all__ = ["Norm", "rotate"]


class Norm:
    """A layer norm, or an RMS norm, of the last dimension.

    Args:
        weight: shape (width,).
        bias: of the same shape; ``None``: there is none.
        epsilon: what is added to the mean of squares.
        centred: whether the mean is taken away first, as a layer norm does and an RMS norm does not.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, epsilon: float, *, centred: bool) -> None:
        library = find_library()
        assert library is not None
        self._run = library.mp_norm
        self._weight = weight.detach().float().contiguous()
        self._bias = None if bias is None else bias.detach().float().contiguous()
        self._width = len(weight)
        self._epsilon = epsilon
        self._centred = centred

    def __call__(
        self, states: torch.Tensor, residual: torch.Tensor | None = None, into: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The norm of ``states``, shape (..., width), float32 or bfloat16.

        Args:
            residual: is added to ``states`` first, in place; of the same shape and dtype, and both contiguous.
            into: where the norm is written to, as ``states`` in shape and dtype; may be these. ``None``: new memory.
        """
        if residual is None:
            states = states.contiguous()
        if states.shape[-1] != self._width or states.dtype not in DTYPES:
            raise ValueError(f"a norm over {self._width} numbers of states of {states.dtype}, {tuple(states.shape)}")
        if residual is not None and not (
            residual.shape == states.shape
            and residual.dtype is states.dtype
            and residual.is_contiguous()
            and states.is_contiguous()
        ):
            raise ValueError(f"a sum of shapes {tuple(states.shape)} and {tuple(residual.shape)}, in place")
        output = torch.empty_like(states) if into is None else into
        if output.shape != states.shape or output.dtype is not states.dtype or not output.is_contiguous():
            raise ValueError(f"a norm of {tuple(states.shape)} into {tuple(output.shape)} of {output.dtype}")
        self._run(
            states.data_ptr(),
            None if residual is None else residual.data_ptr(),
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            states.data_ptr(),
            output.data_ptr(),
            states.shape[:-1].numel(),
            self._width,
            self._epsilon,
            self._centred,
            is_wide(states),
            torch.get_num_threads(),
        )
        return output


def rotate(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Turn ``query`` and ``key`` by their tokens' positions, in place, as ``apply_rotary_pos_emb`` does.

    Args:
        query, key: shape (1, heads, tokens, width), at any distances of heads and tokens.
        cos, sin: shape (1, tokens, width).

    Returns:
        Whether that was done: there may be no library, or tensors may be of other shapes or dtypes.
    """
    library = find_library()
    turns = (1, *query.shape[2:])
    if (
        library is None
        or query.dtype not in DTYPES
        or not query.dtype is key.dtype is cos.dtype is sin.dtype
        or not turns == cos.shape == sin.shape == (1, *key.shape[2:])
        or query.shape[-1] % 2
        or not (cos.is_contiguous() and sin.is_contiguous() and _has_rows(query) and _has_rows(key))
    ):
        return False
    library.mp_rotate(
        *(query.data_ptr(), query.shape[1], query.stride(1), query.stride(2)),
        *(key.data_ptr(), key.shape[1], key.stride(1), key.stride(2)),
        *(cos.data_ptr(), sin.data_ptr(), query.shape[2], query.shape[3]),
        *(is_wide(query), torch.get_num_threads()),
    )
    return True


def _has_rows(states: torch.Tensor) -> bool:
    """Whether ``states`` are of one sequence, and each head of a token is a row of its own in memory."""
    _, head, token, number = states.stride()
    return len(states) == 1 and number == 1 and min(head, token) >= states.shape[-1]
