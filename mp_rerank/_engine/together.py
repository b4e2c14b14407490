"""Layers that are computed together, where each is packed into tiles (``amx``): less goes through memory.

    feed-forward    two layers, one after the other: some rows at a time, and what is between is never written out
    side by side    layers with one input, such as queries', keys' and values': the input is laid out once

The network still calls one layer after the other. The first one of some computes for all, or promises what the next one
computes. Numbers are the same to the last bit. That the network reads a promise nowhere else, its scores show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mp_rerank._engine.amx.linear import BLOCK, TiledProduct
from mp_rerank._engine.parity import Scores, keep_if_equal
from mp_rerank._engine.prepack import PackedLinear

__all__ = ["compute_together"]

# Of two layers: what the first one gives, after its activation and its gate, is the second one's only input.
FEED_FORWARD = (("lin1", "lin2"), ("intermediate.dense", "output.dense"))
GATED_FEED_FORWARD = (("gate_proj", "down_proj"), ("first", "Wo"))
SIDE_BY_SIDE = (("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))


def compute_together(model: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let those layers of ``model`` that are packed into tiles, and stand together, be computed together.

    Args:
        model: changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it; ``None``: scores are known to stay the same.

    Returns:
        Why it does not; empty: it does.
    """
    groups = _find_groups(model)
    if not groups:
        return "it has no layers that stand together in a way known here"

    def change() -> None:
        proved: set[object] = set()
        for group in groups:
            if group.shape not in proved:
                with torch.inference_mode():
                    group.prove()
                proved.add(group.shape)
            group.apply()

    def undo() -> None:
        for group in groups:
            group.undo()

    return keep_if_equal("layers together", change, undo, predict, dtype)


def _find_groups(model: torch.nn.Module) -> list[_Group]:
    packed = {}
    for module in model.modules():
        layer = vars(module).get("forward")
        if isinstance(layer, PackedLinear) and not layer.is_joined and isinstance(layer.product, TiledProduct):
            packed[module] = layer

    def of_names(all_names: Sequence[Sequence[str]]) -> list[list[PackedLinear]]:
        found = []
        for module in model.modules():
            for names in all_names:
                layers = [packed[part] for name in names if (part := _find(module, name)) in packed]
                if len(layers) == len(names):
                    found.append(layers)
        return found

    groups: list[_Group] = []
    taken: set[PackedLinear] = set()
    gated = [layers for layers in of_names(GATED_FEED_FORWARD) if layers[0].product.is_gated]
    for up, down in of_names(FEED_FORWARD) + gated:
        if up.activation and up.product.can_feed(down.product) and taken.isdisjoint((up, down)):
            groups.append(_FeedForward(up, down))
            taken.update((up, down))
    # Not the last ones: of the last layer, `head_only` may ask for few queries.
    for layers in of_names(SIDE_BY_SIDE)[:-1]:
        first, *others = (layer.product for layer in layers)
        if first.can_stand_beside(others) and taken.isdisjoint(layers):
            groups.append(_SideBySide(layers))
            taken.update(layers)
    return groups


def _find(module: torch.nn.Module, name: str) -> torch.nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


class _Group:
    """Layers that are computed together.

    Attributes:
        shape: equal for groups that the same kernels compute.
    """

    def __init__(self, layers: Sequence[PackedLinear], computes: Sequence[Callable[..., torch.Tensor]]) -> None:
        self._layers = layers
        self._computes = computes
        self._products: list[TiledProduct] = [layer.product for layer in layers]
        self.shape = (type(self), *(product.shape for product in self._products))

    def apply(self) -> None:
        for layer, compute in zip(self._layers, self._computes, strict=True):
            layer.compute = compute

    def undo(self) -> None:
        for layer in self._layers:
            layer.compute = layer.product

    def prove(self) -> None:
        """Raise ``ValueError`` unless the kernel gives what the layers give apart.

        A canary has too few tokens for many threads to compute layers together.
        """
        depth, dtype = self._products[0].depth, self._products[0].dtype
        rows = BLOCK * torch.get_num_threads() + 1
        input = torch.randn(rows, depth, generator=torch.Generator().manual_seed(0)).to(dtype)
        if not all(torch.equal(one, other) for one, other in self._both(input)):
            raise ValueError(f"layers of {self.shape[1:]} differ when they are computed together")

    def _both(self, input: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the layers give together, and apart."""
        raise NotImplementedError


class _FeedForward(_Group):
    """Two layers, of which the first one gives a promise, and the second one, called with that, computes both."""

    def __init__(self, up: PackedLinear, down: PackedLinear) -> None:
        super().__init__([up, down], [self._begin, self._end])
        self._width = len(up.linear.weight)
        self._input: torch.Tensor | None = None
        self._promise: torch.Tensor | None = None

    def _begin(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        if operation:
            return self._products[0](input, other, operation)
        nothing = input.new_full((1,), math.nan).expand(*input.shape[:-1], self._width)
        self._input, self._promise = input, nothing  # which takes no memory, and spoils the scores of who reads it
        return nothing

    def _end(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        up, down = self._products
        if input is not self._promise or self._input is None or operation == "mul":
            return down(input, other, operation)
        first, self._input, self._promise = self._input, None, None
        return up.feed(down, first, other)

    def _both(self, input: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        up, down = self._products
        return [(up.feed(down, input), down(up(input)))]


class _SideBySide(_Group):
    """Layers with one input: whichever is called with it first has all of them computed."""

    def __init__(self, layers: Sequence[PackedLinear]) -> None:
        super().__init__(layers, [partial(self._compute, which) for which in range(len(layers))])
        self._input: torch.Tensor | None = None
        self._outputs: dict[int, torch.Tensor] = {}  # that nobody has asked for yet
        self._apart = False  # they have turned out to have inputs of their own, as in cross-attention

    def _compute(
        self, which: int, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = ""
    ) -> torch.Tensor:
        if self._outputs and input is not self._input:
            self._input, self._outputs, self._apart = None, {}, True
        if operation or self._apart:
            return self._products[which](input, other, operation)
        if which not in self._outputs:
            first, *others = self._products
            self._input, self._outputs = input, dict(enumerate(first.side_by_side(others, input)))
        output = self._outputs.pop(which)
        if not self._outputs:
            self._input = None
        return output

    def _both(self, input: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        first, *others = self._products
        return [
            (output, product(input))
            for output, product in zip(first.side_by_side(others, input), self._products, strict=True)
        ]
