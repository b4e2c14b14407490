"""Fewer passes over memory, for what lies between the linear layers of a network: norms, rotations, gates.

torch computes an expression operator by operator, and each one reads and writes all states. In 16 bits, where products
of matrices are fast, that is half of a small network's time. Here the same is computed with fewer and larger operators:

    rotary positions    three passes instead of ten; in float32 as a product of complex numbers
    RMS norms           the sum of squares in one pass, without the squares
    gates               a product in place, or with the product that gives the gate
    residuals           a sum in place, or with the product before it

Numbers that are rotated as complex ones are then in another order, the same in queries and keys, of which attention's
products know nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from mp_rerank._engine.packed import PackedBatch, batch_here
from mp_rerank._engine.parity import Scores, keep_if_equal
from mp_rerank._engine.prepack import plus, times
from mp_rerank._engine.unpad import packing_forward

__all__ = ["fewer_passes"]

ROTATION = "apply_rotary_pos_emb"  # a function's name, in transformers' modules of models


def fewer_passes(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let ``network`` compute norms, rotations, gates and sums in fewer passes over memory, if scores stay the same.

    Args:
        network: one that `unpad` let leave out padding; changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it; ``None``: scores are known to stay the same.

    Returns:
        Why it does not; empty: it does.
    """
    packing = packing_forward(network)
    if packing is None:
        return "it computes padding"
    homes = {type(part).__module__ for part in network.modules()}
    rotating = [sys.modules[home] for home in homes if hasattr(sys.modules.get(home), ROTATION)]
    changes = [found for part in list(network.modules()) if (found := _change_of(part))]
    if not rotating and not changes:
        return "it has no rotary positions, no RMS norms, no gates and no residuals of a kind known here"

    def change() -> None:
        for module in rotating:
            present = getattr(module, ROTATION)
            if not isinstance(present, _Rotation):
                setattr(module, ROTATION, _Rotation(present))
        packing.rotates = True
        for part in changes:
            part.apply()

    def undo() -> None:
        packing.rotates = False
        for part in changes:
            part.undo()

    return keep_if_equal("fewer passes", change, undo, predict, dtype)


class _Rotation:
    """In place of a model's function: faster within a packed batch that ``rotates``, and the function elsewhere."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batch_here()
        if not isinstance(batch, PackedBatch) or not batch.rotates:
            plain: tuple[torch.Tensor, torch.Tensor] = self._plain(query, key, cos, sin, *args, **rest)
            return plain
        if id(cos) not in batch.rotations:  # kept with what it is of, whose id nothing else then gets
            half = cos.shape[-1] // 2
            if cos.dtype is torch.float32:
                turns: tuple[torch.Tensor, ...] = (torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(1),)
            else:
                turns = tuple(part.unsqueeze(1) for part in (cos, sin[..., :half], -sin[..., :half]))
            batch.rotations[id(cos)] = cos, turns
        turns = batch.rotations[id(cos)][1]
        return _turned(query, turns), _turned(key, turns)


def _turned(states: torch.Tensor, turns: tuple[torch.Tensor, ...]) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    if len(turns) == 1:
        numbers = torch.complex(first, second).mul_(turns[0])
        return torch.view_as_real(numbers).flatten(-2)
    cos, sin, minus_sin = turns
    turned = states * cos
    one, other = turned.chunk(2, dim=-1)
    one.addcmul_(second, minus_sin)
    other.addcmul_(first, sin)
    return turned


class _Change:
    """Another ``forward`` for a part of a network."""

    def __init__(self, part: Any, forward: Callable[..., torch.Tensor], *widths: int) -> None:
        self._part = part
        self._forward = forward
        self._widths = widths  # of what it is called with

    def apply(self) -> None:
        self._part.forward = self._forward

    def undo(self) -> None:
        vars(self._part).pop("forward", None)

    def is_alike(self) -> bool:
        """Whether it gives what the part does, up to rounding."""
        dtype = next(self._part.parameters()).dtype
        generator = torch.Generator().manual_seed(0)
        with torch.inference_mode():
            probe = [torch.randn(1, 4, width, generator=generator).to(dtype) for width in self._widths]
            try:
                expected = self._part(*probe)
                self.apply()
                return bool(torch.allclose(self._part(*probe).float(), expected.float(), rtol=2e-2, atol=2e-2))
            except Exception:  # a module that is built otherwise
                return False
            finally:
                self.undo()


class _HalvedChange(_Change):
    """Two linear layers in the place of one, whose output would be cut in two: each can do more than multiply."""

    def __init__(self, part: Any) -> None:
        self._whole = whole = part.Wi  # held by this change alone, which does not outlive the proof
        halves = whole.weight.detach().chunk(2)
        biases = (None, None) if whole.bias is None else whole.bias.detach().chunk(2)
        self._first, self._gate = (_linear(weight, bias) for weight, bias in zip(halves, biases, strict=True))
        super().__init__(
            part,
            lambda states: part.Wo(times(part.gate, states, part.act(part.first(states)))),
            whole.in_features,
        )

    def apply(self) -> None:
        del self._part.Wi
        self._part.first, self._part.gate = self._first, self._gate
        super().apply()

    def undo(self) -> None:
        super().undo()
        if "first" in self._part._modules:
            del self._part.first, self._part.gate
            self._part.Wi = self._whole


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.nn.Linear:
    """A linear layer of these numbers, which are not copied."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias, requires_grad=False)
    return linear.eval()


def _change_of(part: torch.nn.Module) -> _Change | None:
    """How ``part`` is computed in fewer passes, if it is what it looks like."""
    if "forward" in vars(part):
        return None
    found = _guess(part)
    return found if found is not None and found.is_alike() else None


def _guess(part: Any) -> _Change | None:
    names = {name for name, _ in part.named_children()}
    if hasattr(part, "variance_epsilon") and isinstance(getattr(part, "weight", None), torch.nn.Parameter):
        return _Change(part, _rms_norm(part), part.weight.shape[0])
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= names:
        return _Change(
            part,
            lambda states: part.down_proj(times(part.up_proj, states, part.act_fn(part.gate_proj(states)))),
            part.gate_proj.in_features,
        )
    if {"Wi", "Wo", "act"} <= names:
        return _HalvedChange(part)
    if {"dense", "LayerNorm"} <= names:
        return _Change(
            part,
            lambda states, residual: part.LayerNorm(plus(part.dense, states, residual)),
            part.dense.in_features,
            part.dense.out_features,
        )
    return None


def _rms_norm(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon, width = part.weight, part.variance_epsilon, part.weight.shape[0]

    def forward(states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = size.square_().div_(width).add_(epsilon).rsqrt_()
        scaled = wide * scale if wide is states else wide.mul_(scale)
        return scaled.to(states.dtype).mul_(weight)

    return forward
