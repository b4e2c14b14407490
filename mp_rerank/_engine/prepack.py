"""Linear layers with their weights prepacked for oneDNN: the same products, in about half the time on many CPUs.

``nn.Linear`` hands its weight to the BLAS library as it lies in memory, every time. oneDNN can lay a weight out once
for this CPU's registers and caches, and apply a GELU to products that are still in them; ``torch.compile`` with
freezing uses the same two operators. Which layers of float32 gain is measured on the spot, a fraction of a second for
each shape; where none does, or scores would differ, the model stays as it was. In bfloat16, where oneDNN computes in
it, all are prepacked and nothing is measured: workers that chose differently would differ in a score's third digit.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._engine.parity import keep_if_equal
from mp_rerank._engine.row import ROUND

__all__ = ["prepack"]

# Rows of input that the layout is chosen for and measured with: about half a batch of tokens.
ROWS = 512
# Layers of a shape that are timed, one after the other: the same one again would find its weight in the cache, as it
# does in no model, and plain layers would look better than they are.
TIMED = 3
TRIALS = 5
# Numbers of rows that are not made round: there are not many of them.
FEW_ROWS = 64
# Share of the plain layers' time that packed ones may take to be worth it.
WORTHWHILE = 0.97
# The names under which encoders of BERT's family keep a layer and the activation that follows it.
ACTIVATION_AFTER = {"dense": "intermediate_act_fn", "lin1": "activation"}


def prepack(model: torch.nn.Module, dtype: str, predict: Callable[[], npt.NDArray[np.float32]]) -> int:
    """Prepack those ``nn.Linear`` of ``model`` on the CPU that are faster for it, if the model then scores the same.

    Only for a model that does nothing but predict from then on: a packed layer's ``weight`` keeps its shape, dtype and
    device but not its memory, and reads as NaN.

    Args:
        model: changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it: what must not change.

    Returns:
        How many layers are packed now.
    """
    if not torch.backends.mkldnn.is_available():
        return 0
    packed: list[_Packed] = []

    def change() -> None:
        with torch.inference_mode():
            packed.extend(_worthwhile(_candidates(model), _gelus(model)))
        for layer in packed:
            layer.take_over()

    def undo() -> None:
        for layer in packed:
            layer.give_back()

    if not keep_if_equal("prepacked layers", change, undo, predict, dtype):
        return 0
    for layer in packed:
        layer.let_go()
    return len(packed)


class _Packed:
    """A linear layer with its weight packed; in its place from ``take_over`` to ``give_back``, if it comes to that.

    It applies the exact GELU that follows it, whose module passes on what it gets meanwhile.
    """

    def __init__(self, linear: torch.nn.Linear, gelu: torch.nn.Module | None = None) -> None:
        self.linear = linear
        self._gelu = gelu
        self._plain_weight: torch.Tensor | None = linear.weight.data
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._plain_weight, ROWS)
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._activation: tuple[str, list[Any], str] = ("none", [], "") if gelu is None else ("gelu", [], "none")

    def __call__(self, input: torch.Tensor) -> torch.Tensor:
        rows = input.shape[:-1].numel()
        if rows <= FEW_ROWS or rows % ROUND == 0:
            return self._product(input)
        padded = torch.nn.functional.pad(input.flatten(0, -2), (0, 0, 0, -rows % ROUND))
        return self._product(padded)[:rows].unflatten(0, input.shape[:-1])

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, *self._activation)
        return product

    def take_over(self) -> None:
        weight = self.linear.weight.data
        self.linear.weight.data = weight.new_full((1, 1), math.nan).expand(weight.shape)
        self.linear.forward = self
        if self._gelu is not None:
            self._gelu.forward = _identity

    def let_go(self) -> None:
        """Free the plain weight: there is no way back any more."""
        self._plain_weight = None

    def give_back(self) -> None:
        if self._plain_weight is not None:
            self.linear.weight.data = self._plain_weight
        for module in (self.linear, self._gelu):
            if module is not None:
                vars(module).pop("forward", None)


def _worthwhile(linears: list[torch.nn.Linear], gelus: dict[torch.nn.Linear, torch.nn.Module]) -> list[_Packed]:
    """The layers of those shapes that are faster packed, by a few layers of each shape; in bfloat16 all."""
    alike: dict[tuple[Any, ...], list[torch.nn.Linear]] = defaultdict(list)
    for linear in linears:
        shape = linear.in_features, linear.out_features
        alike[linear.weight.dtype, shape, linear.bias is None, linear in gelus].append(linear)
    chosen: list[_Packed] = []
    for (dtype, *_), group in alike.items():
        layers = [(linear, gelus.get(linear)) for linear in group]
        packed = [_Packed(*layer) for layer in layers[:TIMED]]
        plain = [torch.nn.Sequential(*filter(None, layer)) for layer in layers[:TIMED]]
        input = torch.randn(ROWS, group[0].in_features, dtype=dtype)
        if dtype is torch.bfloat16 or _share_of_time(packed, plain, input) < WORTHWHILE:
            chosen += packed + [_Packed(*layer) for layer in layers[TIMED:]]
    return chosen


def _share_of_time(
    packed: Sequence[Callable[..., object]], plain: Sequence[Callable[..., object]], input: torch.Tensor
) -> float:
    """The time that ``packed`` take for ``input``, each for itself, as a share of what ``plain`` take."""
    best = [math.inf, math.inf]
    for _ in range(TRIALS + 1):  # in turn, so that a neighbour's load falls on both; the first one warms up
        for which, layers in enumerate((packed, plain)):
            start = time.perf_counter()
            for layer in layers:
                layer(input)
            best[which] = min(best[which], time.perf_counter() - start)
    return best[0] / best[1]


def _gelus(model: torch.nn.Module) -> dict[torch.nn.Linear, torch.nn.Module]:
    """Linear layers and the exact GELU that follows each."""
    found = {}
    for module in model.modules():
        for layer_name, activation_name in ACTIVATION_AFTER.items():
            layer, activation = getattr(module, layer_name, None), getattr(module, activation_name, None)
            if (
                isinstance(layer, torch.nn.Linear)
                and isinstance(activation, torch.nn.Module)
                and "forward" not in vars(activation)
                and _is_exact_gelu(activation)
            ):
                found[layer] = activation
    return found


def _is_exact_gelu(activation: torch.nn.Module) -> bool:
    probe = torch.linspace(-3, 3, 61)  # float32 tells the exact one from its approximation
    return bool(torch.equal(activation(probe), torch.nn.functional.gelu(probe)))


def _identity(input: torch.Tensor) -> torch.Tensor:
    return input


def _candidates(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Plain linear layers on the CPU, each alone with its weight: a tied one is read elsewhere."""
    dtypes = [torch.float32]
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.append(torch.bfloat16)
    owners = Counter(id(parameter) for module in model.modules() for parameter in module._parameters.values())
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and owners[id(module.weight)] == 1
        and module.weight.device.type == "cpu"
        and module.weight.dtype in dtypes
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    ]
