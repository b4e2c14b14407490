"""Fewer passes over memory, for what lies between the linear layers of a network: norms, rotations, gates.

torch computes an expression operator by operator, and each one reads and writes all states. In 16 bits, where products
of matrices are fast, that is half of a small network's time. Here the same is computed with fewer and larger operators:

    rotary positions    a rotation of pairs of numbers is a product of complex numbers: three passes instead of ten
    RMS norms           the sum of squares in one pass, without the squares
    gates               a product in place

Rotated queries and keys have their numbers in another order, the same in both, of which attention's products know
nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from mp_rerank._engine.packed import batch_here
from mp_rerank._engine.parity import Scores, keep_if_equal
from mp_rerank._engine.unpad import packing_forward

__all__ = ["fewer_passes"]

ROTATION = "apply_rotary_pos_emb"  # a function's name, in transformers' modules of models


def fewer_passes(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let ``network`` compute norms, rotations and gates in fewer passes over memory, if scores stay the same.

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
    forwards = {part: forward for part in network.modules() if (forward := _forward(part)) and _is_alike(part, forward)}
    if not rotating and not forwards:
        return "it has no rotary positions, no RMS norms and no gates"

    def change() -> None:
        for module in rotating:
            present = getattr(module, ROTATION)
            if not isinstance(present, _Rotation):
                setattr(module, ROTATION, _Rotation(present))
        packing.rotates = True
        for part, forward in forwards.items():
            part.forward = forward

    def undo() -> None:
        packing.rotates = False
        for part in forwards:
            vars(part).pop("forward", None)

    return keep_if_equal("fewer passes", change, undo, predict, dtype)


class _Rotation:
    """In place of a model's function: faster within a packed batch that ``rotates``, and the function elsewhere."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        self._plain = plain

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch = batch_here()
        if batch is None or not batch.rotates:
            plain: tuple[torch.Tensor, torch.Tensor] = self._plain(query, key, cos, sin, *args, **rest)
            return plain
        if id(cos) not in batch.rotations:  # kept with what it is of, whose id nothing else then gets
            half = cos.shape[-1] // 2
            turns = torch.complex(cos[..., :half].float(), sin[..., :half].float()).unsqueeze(1)
            batch.rotations[id(cos)] = cos, turns
        turns = batch.rotations[id(cos)][1]
        return _turned(query, turns), _turned(key, turns)


def _turned(states: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    numbers = torch.complex(first.float(), second.float()).mul_(turns)
    return torch.view_as_real(numbers).flatten(-2).to(states.dtype)


def _forward(part: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A ``forward`` with fewer passes for ``part``, if it is what it looks like."""
    if "forward" in vars(part):
        return None
    if hasattr(part, "variance_epsilon") and isinstance(getattr(part, "weight", None), torch.nn.Parameter):
        return _rms_norm(part)
    if all(hasattr(part, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return lambda states: part.down_proj(part.act_fn(part.gate_proj(states)).mul_(part.up_proj(states)))
    if all(hasattr(part, name) for name in ("Wi", "Wo", "act")):
        return _gated(part)
    return None


def _rms_norm(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon, width = part.weight, part.variance_epsilon, part.weight.shape[0]

    def forward(states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = size.square_().div_(width).add_(epsilon).rsqrt_()
        return (wide * scale).to(states.dtype).mul_(weight)

    return forward


def _gated(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(states: torch.Tensor) -> torch.Tensor:
        first, gate = part.Wi(states).chunk(2, dim=-1)
        return part.Wo(part.act(first).mul_(gate))

    return forward


def _is_alike(part: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    """Whether ``forward`` gives what ``part`` does, up to rounding."""
    weight = next(part.parameters())
    with torch.inference_mode():
        probe = torch.randn(4, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
        try:
            return bool(torch.allclose(forward(probe).float(), part(probe).float(), rtol=2e-2, atol=2e-2))
        except Exception:  # a module that is built otherwise
            return False
