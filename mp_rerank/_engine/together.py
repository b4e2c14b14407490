"""Layers that are computed together, where each is packed into tiles (``amx``): less goes through memory.

    gates           two layers with one input, whose outputs are multiplied: one product of both weights
    feed-forward    two layers, one after the other: some rows at a time, and what is between is never written out
    side by side    layers with one input, such as queries', keys' and values': the input is laid out once

The network still calls one layer after the other. The first one of some computes for all, or promises what the next one
computes. That the network reads a promise nowhere else is shown by its scores, as for all that is packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import torch

from mp_rerank._engine.amx.linear import TiledProduct

__all__ = ["Compute", "PackedLayer", "compute_together"]

#: what a packed layer is called with: its input; what its output is added to or multiplied with; which of the two
Compute = Callable[[torch.Tensor, torch.Tensor | None, str], torch.Tensor]

# Of two layers: `fused` multiplies the second one's output with the first one's.
GATES = (("gate_proj", "up_proj"), ("first", "gate"))
# Two such layers are computed as one if their columns are a multiple of this.
GATE_MULTIPLE = 16
# Of two layers: what the first one gives, after its activation and its gate, is the second one's only input.
FEED_FORWARD = (("lin1", "lin2"), ("intermediate.dense", "output.dense"))
GATED_FEED_FORWARD = (("gate_proj", "down_proj"), ("first", "Wo"))
SIDE_BY_SIDE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


class PackedLayer(Protocol):
    """A linear layer whose weight is packed.

    Attributes:
        linear: where it is in the network.
        activation: the name of what follows its product; empty: nothing.
        product: of its weight alone.
        compute: what a call of it does.
        is_joined: whether its output is multiplied with that of another layer, in whose product it is.
    """

    linear: torch.nn.Linear
    activation: str
    product: TiledProduct
    compute: Compute
    is_joined: bool


def compute_together(model: torch.nn.Module, packed: Sequence[PackedLayer]) -> None:
    """Let those of ``packed``, all in tiles, that stand together in ``model`` be computed together."""
    of = {layer.linear: layer for layer in packed}

    def groups(all_names: Sequence[Sequence[str]], modules: Iterable[torch.nn.Module]) -> list[list[PackedLayer]]:
        found = []
        for module in modules:
            for names in all_names:
                layers = [of.get(_find(module, name)) for name in names]
                if None not in layers:
                    found.append([layer for layer in layers if layer])
        return found

    changed = [module for module in model.modules() if "forward" in vars(module)]  # by `fused`
    for first, gate in groups(GATES, changed):
        _join_gate(first, gate)
    pairs = groups(FEED_FORWARD, model.modules())
    pairs += [layers for layers in groups(GATED_FEED_FORWARD, changed) if layers[0].product.is_gated]
    for up, down in pairs:
        if up.activation and not down.is_joined and up.product.can_feed(down.product):
            _FeedForward(up, down)
    for layers in groups(SIDE_BY_SIDE, model.modules())[:-1]:  # of the last layer, `head_only` may ask for few queries
        if not any(layer.activation or layer.is_joined for layer in layers):
            _SideBySide(layers)


def _find(module: torch.nn.Module, name: str) -> torch.nn.Linear | None:
    try:
        found = module.get_submodule(name)
    except AttributeError:
        return None
    return found if isinstance(found, torch.nn.Linear) else None


def _join_gate(layer: PackedLayer, gate: PackedLayer) -> None:
    """Multiply the output of ``layer``, after its activation, with that of ``gate``, in one product of both weights."""
    first, second = layer.linear, gate.linear
    alike = (
        not gate.is_joined
        and first.weight.shape == second.weight.shape
        and (first.bias is None) == (second.bias is None)
    )
    if alike and layer.activation and not gate.activation and len(first.weight) % GATE_MULTIPLE == 0:
        weights = second.weight.detach(), None if second.bias is None else second.bias.detach()
        bias = None if first.bias is None else first.bias.detach()
        layer.compute = layer.product = TiledProduct(first.weight.detach(), bias, layer.activation, weights)
        del gate.product, gate.compute  # nobody asks for them
        gate.is_joined = True


class _FeedForward:
    """Two layers, of which the first one gives a promise, and the second one, called with that, computes both."""

    def __init__(self, up: PackedLayer, down: PackedLayer) -> None:
        self._up, self._down = up.product, down.product
        self._width = len(up.linear.weight)
        self._input: torch.Tensor | None = None
        self._promise: torch.Tensor | None = None
        up.compute, down.compute = self._begin, self._end

    def _begin(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        nothing = input.new_full((1,), math.nan).expand(*input.shape[:-1], self._width)
        self._input, self._promise = input, nothing  # which takes no memory, and spoils the scores of who reads it
        return nothing

    def _end(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        if input is not self._promise or self._input is None or operation == "mul":
            return self._down(input, other, operation)
        first, self._input, self._promise = self._input, None, None
        return self._up.feed(self._down, first, other)


class _SideBySide:
    """Layers with one input: whichever is called with it first has all of them computed."""

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self._products = [layer.product for layer in layers]
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}  # that nobody has asked for yet
        for which, layer in enumerate(layers):
            layer.compute = partial(self._compute, which)

    def _compute(
        self, which: int, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = ""
    ) -> torch.Tensor:
        if operation:
            return self._products[which](input, other, operation)
        if input is not self._input or which not in self._outputs:
            first, *others = self._products
            self._input, self._outputs = input, dict(enumerate(first.side_by_side(others, input)))
        output = self._outputs.pop(which)
        if not self._outputs:
            self._input = None
        return output
