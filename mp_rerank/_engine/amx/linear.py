"""A linear layer with its weight packed into AMX tiles."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from mp_rerank._engine.amx.library import find_library, is_wide

__all__ = ["BLOCK", "TiledProduct"]

ALIGNMENT = 64  # bytes of a line of the cache
BLOCK = 32  # rows, and columns, that are computed together: fewer rows for each thread are computed layer by layer
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

    Attributes:
        depth: numbers of a row of the input.
        dtype: of the weight, the input and the output.
        is_gated: whether there is a gate.
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
        self._library = library
        self._columns, self.depth = weight.shape
        self.dtype = weight.dtype
        self._wide = is_wide(weight)
        self.is_gated = gate is not None
        self._then = THEN[activation] + (GATED if self.is_gated else 0)
        size = library.mp_packed_bytes(self._columns, self.depth, self._wide)
        self._memory = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
        packed = -(-self._memory.data_ptr() // ALIGNMENT) * ALIGNMENT
        library.mp_pack(weight.data_ptr(), packed, self._columns, self.depth, self._wide, torch.get_num_threads())
        self._bias = None if bias is None else torch.nn.functional.pad(bias.float(), (0, -self._columns % BLOCK))
        #: as the library takes them
        self._weight = packed, None if self._bias is None else self._bias.data_ptr()

    def __call__(
        self,
        input: torch.Tensor,
        other: torch.Tensor | None = None,
        operation: str = "",
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The layer's output; with ``other``, that output and ``other`` added (``"add"``) or multiplied (``"mul"``).

        Args:
            input: shape (..., depth).
            other: shape (..., columns); none where there is a gate.
            into: where the output is written to, of its shape and dtype; not where ``input`` is. ``None``: new memory.
        """
        if operation and self._then:
            raise ValueError("a layer with an activation or a gate adds and multiplies nothing else")
        input, other, output = self._operands(input, other, self._width, into)
        self._library.mp_linear(
            input.data_ptr(),
            *self._weight,
            None if other is None else other.data_ptr(),
            output.data_ptr(),
            input.shape[:-1].numel(),
            self.depth,
            self._columns,
            self._wide,
            THEN[operation] if operation else self._then,
            torch.get_num_threads(),
        )
        return output

    @property
    def shape(self) -> tuple[int, int, int, torch.dtype]:
        """Equal for products that the same kernel computes: depth, columns, what is done with sums, dtype."""
        return self.depth, self._columns, self._then, self.dtype

    def can_feed(self, down: TiledProduct) -> bool:
        """Whether ``feed`` takes ``down``: a plain layer of as many numbers as this one gives, a multiple of 32."""
        return self._width == down.depth and self._width % BLOCK == 0 and self.dtype is down.dtype and not down._then

    def feed(
        self,
        down: TiledProduct,
        input: torch.Tensor,
        other: torch.Tensor | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``down`` of this layer's output, and ``other`` added, for some rows at a time: less is written out.

        Args:
            input: shape (..., depth).
            other: shape (..., columns of ``down``).
            into: as in a call.
        """
        if not self.can_feed(down):
            raise ValueError(f"a layer of {self.shape} cannot feed one of {down.shape}")
        threads = torch.get_num_threads()
        rows = input.shape[:-1].numel()
        if rows < BLOCK * threads:  # too few for each thread to have some: threads share columns, too
            return down(self(input), other, "" if other is None else "add", into)
        input, other, output = self._operands(input, other, down._width, into)
        self._library.mp_feed_forward(
            input.data_ptr(),
            *self._weight,
            *down._weight,
            None if other is None else other.data_ptr(),
            output.data_ptr(),
            rows,
            self.depth,
            self._width,
            down._width,
            self._wide,
            self._then,
            threads,
        )
        return output

    def can_stand_beside(self, others: Sequence[TiledProduct]) -> bool:
        """Whether ``side_by_side`` takes ``others``: at most three, plain, of as many numbers of the same dtype."""
        layers = [self, *others]
        alike = len({(layer.depth, layer.dtype, layer._then) for layer in layers}) == 1
        return alike and not self._then and len(layers) <= 4

    def side_by_side(
        self, others: Sequence[TiledProduct], input: torch.Tensor, into: Sequence[torch.Tensor | None] | None = None
    ) -> list[torch.Tensor]:
        """The outputs of this layer and of others that `can_stand_beside` it, of one input, which is laid out once.

        Args:
            into: for each output, as in a call.
        """
        if not self.can_stand_beside(others):
            raise ValueError(f"layers of {[layer.shape for layer in (self, *others)]} have no input in common")
        threads = torch.get_num_threads()
        rows = input.shape[:-1].numel()
        layers = [self, *others]
        into = into or [None] * len(layers)
        if rows < BLOCK * threads:  # as in ``feed``
            return [layer(input, into=output) for layer, output in zip(layers, into, strict=True)]
        outputs = [
            layer._operands(input, None, layer._width, output)[2] for layer, output in zip(layers, into, strict=True)
        ]
        input = input.contiguous()
        addresses = ctypes.c_void_p * len(layers)
        self._library.mp_side_by_side(
            input.data_ptr(),
            addresses(*(layer._weight[0] for layer in layers)),
            addresses(*(layer._weight[1] for layer in layers)),
            addresses(*(output.data_ptr() for output in outputs)),
            (ctypes.c_long * len(layers))(*(layer._columns for layer in layers)),
            len(layers),
            rows,
            self.depth,
            self._wide,
            threads,
        )
        return outputs

    def _operands(
        self, input: torch.Tensor, other: torch.Tensor | None, width: int, into: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """``input`` and ``other`` as the library takes them, and where the output goes, of so many columns."""
        if input.shape[-1] != self.depth or input.dtype is not self.dtype:
            raise ValueError(f"{tuple(input.shape)} of {input.dtype} for a layer of {self.depth} of {self.dtype}")
        input = input.contiguous()
        shape = (*input.shape[:-1], width)
        output = input.new_empty(shape) if into is None else into
        if into is not None and (into.shape != shape or into.dtype is not self.dtype or not into.is_contiguous()):
            raise ValueError(f"an output of {shape} into {tuple(into.shape)} of {into.dtype}")
        if other is not None:
            other = other.contiguous()
            if other.shape != output.shape or other.dtype is not self.dtype:
                raise ValueError(f"{tuple(output.shape)} of {self.dtype} and {tuple(other.shape)} of {other.dtype}")
        return input, other, output


def _in_turn(first: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """16 columns of ``first``, the same 16 of ``gate``, and so on."""
    return torch.stack([first.unflatten(0, (-1, HALF)), gate.unflatten(0, (-1, HALF))], dim=1).flatten(0, 2)
