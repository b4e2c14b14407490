"""A linear layer with its weight packed into AMX tiles."""

from __future__ import annotations

from typing import Any

import torch

from mp_rerank._engine.amx.library import find_library, is_wide

__all__ = ["TiledProduct"]

ALIGNMENT = 64  # bytes of a line of the cache
BLOCK = 32  # columns that are computed together
#: what the kernel does with a sum of products
THEN = {"": 0, "gelu": 1, "gelu_tanh": 2, "silu": 3, "add": 4, "mul": 5}
GATED = 16
HALF = BLOCK // 2


class TiledProduct:
    """Products with one weight. In float32 they are as exact as float32 arithmetic; see ``tiles.h`` for how.

    Args:
        weight: float32 or bfloat16, shape (columns, depth); copied, in float32 as half as many bytes again.
        bias: shape (columns,), or ``None``.
        activation: ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, or empty.
        gate: another weight and bias of the same shapes, whose products those after the activation are multiplied with.
            Columns are then a multiple of 16, and both have a bias or neither.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        activation: str,
        gate: tuple[torch.Tensor, Any] | None = None,
    ) -> None:
        library = find_library()
        assert library is not None
        self._width = len(weight)
        if gate is not None:
            weight = _in_turn(weight, gate[0])
            bias = None if bias is None else _in_turn(bias, gate[1])
        weight = weight.contiguous()
        self._run = library.mp_linear
        self._columns, self._depth = weight.shape
        self._dtype = weight.dtype
        self._wide = is_wide(weight)
        self._then = THEN[activation] + (0 if gate is None else GATED)
        size = library.mp_packed_bytes(self._columns, self._depth, self._wide)
        self._memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        self._packed = -(-self._memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        library.mp_pack(
            weight.data_ptr(), self._packed, self._columns, self._depth, self._wide, torch.get_num_threads()
        )
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, -self._columns % BLOCK))

    def __call__(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        """The layer's output; with ``other``, that output and ``other`` added (``"add"``) or multiplied (``"mul"``).

        Args:
            input: shape (..., depth).
            other: shape (..., columns); none where there is a gate.
        """
        if input.shape[-1] != self._depth or input.dtype is not self._dtype:
            raise ValueError(f"{tuple(input.shape)} of {input.dtype} for a layer of {self._depth} of {self._dtype}")
        if operation and self._then:
            raise ValueError("a layer with an activation or a gate adds and multiplies nothing else")
        input = input.contiguous()
        output = input.new_empty((*input.shape[:-1], self._width))
        if other is not None:
            other = other.contiguous()
            if other.shape != output.shape or other.dtype is not self._dtype:
                raise ValueError(f"{tuple(output.shape)} of {self._dtype} and {tuple(other.shape)} of {other.dtype}")
        self._run(
            input.data_ptr(),
            self._packed,
            None if self._bias is None else self._bias.data_ptr(),
            None if other is None else other.data_ptr(),
            output.data_ptr(),
            input.shape[:-1].numel(),
            self._depth,
            self._columns,
            self._wide,
            THEN[operation] if operation else self._then,
            torch.get_num_threads(),
        )
        return output


def _in_turn(first: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """16 columns of ``first``, the same 16 of ``gate``, and so on."""
    return torch.stack([first.unflatten(0, (-1, HALF)), gate.unflatten(0, (-1, HALF))], dim=1).flatten(0, 2)
