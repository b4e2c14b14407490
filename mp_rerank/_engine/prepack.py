"""Linear layers with their weights prepacked: the same products, in half the time or less on many CPUs.

``nn.Linear`` gives its weight to the BLAS library as it lies in memory, in every call. Here a weight is laid out once,
for this CPU's registers and caches, and an activation is applied to products that are still in them, or other numbers
are added or multiplied. On a CPU with AMX that is done by kernels of our own (``amx``), elsewhere by oneDNN, with the
operators that ``torch.compile`` with freezing uses.

In float32, a few layers of each shape are timed as the worker starts, which takes a fraction of a second, and only
shapes that are faster prepacked are prepacked. If scores would differ, none is. In bfloat16, where oneDNN computes in
it, all layers are prepacked and nothing is timed: workers that chose differently would differ in a score's third digit.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from mp_rerank._engine.amx.library import find_library
from mp_rerank._engine.amx.linear import TiledProduct
from mp_rerank._engine.packed import TOKEN_MULTIPLE
from mp_rerank._engine.parity import Scores, keep_if_equal

__all__ = ["PackedLinear", "plus", "prepack", "times"]

# Tokens of input that the layout is chosen for and timed with: about half a batch.
TIMED_TOKENS = 512
# Layers of a shape that are timed, one after the other. One layer again and again would find its weight in the cache,
# which no layer of a model does, and plain layers would look better than they are.
TIMED_LAYERS = 3
TRIALS = 5
# Up to here, the number of tokens is not rounded up to a multiple: these are few numbers.
FEW_TOKENS = 64
# A layer is prepacked if it then takes at most this share of its time.
WORTHWHILE = 0.97
# The names under which models keep a layer and the activation that follows it; the last is ``fused``'s own.
ACTIVATION_AFTER = {"dense": "intermediate_act_fn", "lin1": "activation", "gate_proj": "act_fn", "first": "act"}
# Those of two layers with one input, where ``fused`` multiplies the second one's output with the first one's.
GATES = (("gate_proj", "up_proj"), ("first", "gate"))
# Two such layers are computed as one if their columns are a multiple of this.
GATE_MULTIPLE = 16
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}
#: how oneDNN is asked for them
ONEDNN_NAMES: dict[str, tuple[str, list[Any], str]] = {
    "": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "gelu_tanh": ("gelu", [], "tanh"),
    "silu": ("swish", [], ""),
}


def prepack(
    model: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None, names: Sequence[str] | None = None
) -> tuple[list[str], str]:
    """Prepack those ``nn.Linear`` of ``model`` on the CPU that are faster for it, if scores stay the same.

    Only for a model that does nothing but predict from then on: a packed layer's ``weight`` keeps its shape, dtype and
    device, but not its memory, and reads as NaN.

    Args:
        model: changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it; ``None``: scores are known to stay the same.
        names: the layers that are known to be faster prepacked; ``None``: time them.

    Returns:
        The names of the layers that are packed now, and why there are none, if so.
    """
    if not torch.backends.mkldnn.is_available():
        return [], "this torch is built without oneDNN"
    packed: list[PackedLinear] = []

    def change() -> None:
        with torch.inference_mode():
            activations = _activations(model)
            if names is None:
                packed.extend(_worthwhile(_candidates(model), activations))
            else:
                packed.extend(
                    PackedLinear(linear, activations.get(linear)) for linear in map(model.get_submodule, names)
                )
            _join_gates(model, packed)
        for layer in packed:
            layer.replace()

    def undo() -> None:
        for layer in packed:
            layer.restore()

    why_not = keep_if_equal("prepacked layers", change, undo, predict, dtype)
    if why_not or not packed:
        return [], why_not or "no layer is faster"
    for layer in packed:
        layer.free_plain_weight()
    found = {module: name for name, module in model.named_modules()}
    return [found[layer.linear] for layer in packed], ""


def times(linear: torch.nn.Module, input: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``linear(input) * factor``, without a pass over memory of its own where ``linear`` is prepacked."""
    packed = vars(linear).get("forward")
    if isinstance(packed, PackedLinear):
        return factor if packed.is_joined else packed(input, factor, "mul")
    return linear(input).mul_(factor)


def plus(linear: torch.nn.Module, input: torch.Tensor, summand: torch.Tensor) -> torch.Tensor:
    """``linear(input) + summand``, without a pass over memory of its own where ``linear`` is prepacked."""
    packed = vars(linear).get("forward")
    return packed(input, summand, "add") if isinstance(packed, PackedLinear) else linear(input).add_(summand)


class _OneDnnProduct:
    """Products with one weight, laid out for oneDNN. Its arguments are `TiledProduct`'s, in its stead."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, activation: str) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, TIMED_TOKENS)
        self._bias = bias
        self._applied = ONEDNN_NAMES[activation]

    def __call__(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        tokens = input.shape[:-1].numel()
        if tokens <= FEW_TOKENS or tokens % TOKEN_MULTIPLE == 0:
            if other is None:
                return self._product(input)
            return torch.ops.mkldnn._linear_pointwise.binary(input, other, self._weight, self._bias, operation)
        padded = torch.nn.functional.pad(input.flatten(0, -2), (0, 0, 0, -tokens % TOKEN_MULTIPLE))
        product = self._product(padded)[:tokens].unflatten(0, input.shape[:-1])
        if other is None:
            return product
        return product.add_(other) if operation == "add" else product.mul_(other)

    def _product(self, input: torch.Tensor) -> torch.Tensor:
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(input, self._weight, self._bias, *self._applied)
        return product


class PackedLinear:
    """A linear layer with its weight packed, and the activation that follows it, if one does that is known here.

    ``replace`` puts it in the layer's place, and lets the activation's module return what it is given. Then comes
    ``restore`` or ``free_plain_weight``.

    Attributes:
        linear: the layer.
        activation: the name of what is applied to its products; empty: nothing.
        product: of its weight, and of a gate's where that is joined: a `TiledProduct`, or oneDNN's.
        compute: what a call does. It is ``product``, unless the layer is computed together with others (``together``).
        is_joined: whether what it would be multiplied with is multiplied already: see ``join``.
    """

    def __init__(self, linear: torch.nn.Linear, activation: torch.nn.Module | None = None) -> None:
        self.linear = linear
        self._activation_module = activation
        self._plain_weight: torch.Tensor | None = linear.weight.data
        bias = None if linear.bias is None else linear.bias.detach()
        self.activation = "" if activation is None else _known_activation(activation)
        self.is_joined = False
        kind: Any = TiledProduct if find_library() else _OneDnnProduct
        self.product = kind(linear.weight.detach(), bias, self.activation)
        self.compute: Callable[..., torch.Tensor] = self.product

    def __call__(self, input: torch.Tensor, other: torch.Tensor | None = None, operation: str = "") -> torch.Tensor:
        """The layer's output; with ``other``, that output and ``other`` added (``"add"``) or multiplied (``"mul"``)."""
        return self.compute(input, other, operation)

    def join(self, gate: PackedLinear) -> None:
        """Multiply this layer's output, after its activation, with that of ``gate``, in one product of both weights."""
        first, second = self.linear, gate.linear
        alike = (
            not gate.is_joined
            and first.weight.shape == second.weight.shape
            and (first.bias is None) == (second.bias is None)
        )
        if alike and self.activation and not gate.activation and len(first.weight) % GATE_MULTIPLE == 0:
            weights = second.weight.detach(), None if second.bias is None else second.bias.detach()
            bias = None if first.bias is None else first.bias.detach()
            self.compute = self.product = TiledProduct(first.weight.detach(), bias, self.activation, weights)
            del gate.product, gate.compute  # nobody asks for them
            gate.is_joined = True

    def replace(self) -> None:
        weight = self.linear.weight.data
        self.linear.weight.data = weight.new_full((1, 1), math.nan).expand(weight.shape)
        self.linear.forward = self
        if self._activation_module is not None:
            self._activation_module.forward = _identity

    def free_plain_weight(self) -> None:
        """After this, there is no ``restore``."""
        self._plain_weight = None

    def restore(self) -> None:
        if self._plain_weight is not None:
            self.linear.weight.data = self._plain_weight
        for module in (self.linear, self._activation_module):
            if module is not None:
                vars(module).pop("forward", None)


def _join_gates(model: torch.nn.Module, packed: Sequence[PackedLinear]) -> None:
    """Let a gate be computed with the layer that it opens, where both are packed into tiles and joined by `times`."""
    if find_library() is None:
        return
    of = {layer.linear: layer for layer in packed}
    for module in model.modules():
        for names in GATES:
            first, gate = (of.get(vars(module)["_modules"].get(name)) for name in names)
            if first and gate and "forward" in vars(module):
                first.join(gate)


def _worthwhile(
    linears: list[torch.nn.Linear], activations: dict[torch.nn.Linear, torch.nn.Module]
) -> list[PackedLinear]:
    """The layers of those shapes that are faster packed, as a few layers of each shape show; in bfloat16 all."""
    alike: dict[tuple[Any, ...], list[torch.nn.Linear]] = defaultdict(list)
    for linear in linears:
        shape = linear.in_features, linear.out_features
        alike[linear.weight.dtype, shape, linear.bias is None, linear in activations].append(linear)
    chosen: list[PackedLinear] = []
    for (dtype, *_), group in alike.items():
        layers = [(linear, activations.get(linear)) for linear in group]
        packed = [PackedLinear(*layer) for layer in layers[:TIMED_LAYERS]]
        plain = [torch.nn.Sequential(*filter(None, layer)) for layer in layers[:TIMED_LAYERS]]
        input = torch.randn(TIMED_TOKENS, group[0].in_features, dtype=dtype)
        if dtype is torch.bfloat16 or _share_of_time(packed, plain, input) < WORTHWHILE:
            chosen += packed + [PackedLinear(*layer) for layer in layers[TIMED_LAYERS:]]
    return chosen


def _share_of_time(
    packed: Sequence[Callable[..., object]], plain: Sequence[Callable[..., object]], input: torch.Tensor
) -> float:
    """The time that the layers ``packed`` take for ``input``, one after the other, as a share of that of ``plain``."""
    best = [math.inf, math.inf]
    for _ in range(TRIALS + 1):  # in turn, so that a neighbour's load falls on both; the first one warms up
        for which, layers in enumerate((packed, plain)):
            start = time.perf_counter()
            for layer in layers:
                layer(input)
            best[which] = min(best[which], time.perf_counter() - start)
    return best[0] / best[1]


def _activations(model: torch.nn.Module) -> dict[torch.nn.Linear, torch.nn.Module]:
    """Linear layers and the activation that follows each, of those that a product can end with."""
    found = {}
    for module in model.modules():
        for layer_name, activation_name in ACTIVATION_AFTER.items():
            layer, activation = getattr(module, layer_name, None), getattr(module, activation_name, None)
            if (
                isinstance(layer, torch.nn.Linear)
                and isinstance(activation, torch.nn.Module)
                and "forward" not in vars(activation)
                and _known_activation(activation)
            ):
                found[layer] = activation
    return found


def _known_activation(activation: torch.nn.Module) -> str:
    """The name that ``activation`` has here; empty: none."""
    probe = torch.linspace(-3, 3, 61)  # float32 tells the exact GELU from its approximation
    found = activation(probe)
    return next((name for name, function in ACTIVATIONS.items() if torch.equal(found, function(probe))), "")


def _identity(input: torch.Tensor) -> torch.Tensor:
    return input


def _candidates(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Plain linear layers on the CPU whose weight is theirs alone: a tied weight is read elsewhere."""
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
