"""Fewer passes over memory, for what lies between the linear layers of a network: norms, rotations, gates.

torch computes an expression operator by operator, and each one reads and writes all states. In 16 bits, where products
of matrices are fast, that is half of a small network's time. Here the same is computed with fewer and larger operators:

    rotary positions    three passes instead of ten; in float32 as a product of complex numbers
    RMS norms           the sum of squares in one pass, without the squares
    gates               a product in place, or with the product that gives the gate
    residuals           a sum in place, or with the product before it

Numbers that are rotated as complex ones are then in another order, the same in queries and keys, of which attention's
products know nothing.

On a CPU with AMX, rotary positions, RMS norms and layer norms are one pass each, in kernels of our own (``amx.rows``),
and so is a norm with the sum before it. Embeddings of positions and of types are then added up once, for every position
and type that there is, and those of words are the sum's other part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mp_rerank._engine.amx.library import DTYPES, find_library
from mp_rerank._engine.amx.rows import Norm, rotate
from mp_rerank._engine.packed import PackedBatch, batch_here
from mp_rerank._engine.parity import Scores, keep_if_equal
from mp_rerank._engine.prepack import plus, times
from mp_rerank._engine.unpad import packing_forward

__all__ = ["fewer_passes"]

ROTATION = "apply_rotary_pos_emb"  # a function's name, in transformers' modules of models
#: the parts of embeddings in BERT's family, DeBERTa's apart
EMBEDDINGS = {"word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm"}
#: the parts of a layer that adds to its states what attention gives of their norm, and then what a gated network does
LAYER_PARTS = (
    ("attn_norm", "attn", "mlp_norm", "mlp"),
    ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
)


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
    of_parts = {part: found for part in list(network.modules()) if (found := _change_of(part))}
    changes = [*of_parts.values(), *_layer_changes(network, of_parts)]
    if not rotating and not changes:
        return "it has no rotary positions, no norms, no gates and no residuals of a kind known here"

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
        # In place: both were made for this alone, of hidden states.
        if rotate(query, key, cos, sin):
            return query, key
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
        self.forward = forward
        self._widths = widths  # of what it is called with

    def apply(self) -> None:
        self._part.forward = self.forward

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
            lambda states, residual=None: _plus(
                part.Wo, times(part.gate, states, part.act(part.first(states))), residual
            ),
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


class _EmbeddingsChange(_Change):
    """Embeddings of words, and the sums of those of positions and types; their sum in the pass of the norm."""

    def __init__(self, part: Any, norm: Norm) -> None:
        self._plain = part.forward
        self._norm = norm
        positions, types = (table.weight.detach() for table in (part.position_embeddings, part.token_type_embeddings))
        self._types = len(types)
        # A type's rows are not together: a position beyond the last is then an error, and no other type's first. Types
        # are those of the tokenizer's template, which the canary's pairs have all.
        self._others = (positions[:, None].float() + types.float()).flatten(0, 1).to(positions.dtype)
        super().__init__(part, self._embed)

    def _embed(
        self,
        input_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **rest: Any,
    ) -> torch.Tensor:
        if input_ids is None or position_ids is None or rest.get("inputs_embeds") is not None:
            plain: torch.Tensor = self._plain(
                input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, **rest
            )
            return plain
        places = position_ids if self._types == 1 else position_ids * self._types
        if self._types > 1 and token_type_ids is not None:
            places = places + token_type_ids
        states = torch.nn.functional.embedding(input_ids, self._part.word_embeddings.weight)
        return self._norm(states, torch.nn.functional.embedding(places, self._others).expand_as(states).contiguous())

    def is_alike(self) -> bool:
        words, positions = len(self._part.word_embeddings.weight), len(self._others) // self._types
        count = min(32, positions)
        probe = {
            "input_ids": torch.linspace(0, words - 1, count).long()[None],
            "token_type_ids": (torch.arange(count) % self._types)[None],
            "position_ids": torch.linspace(positions - 1, 0, count).long()[None],
        }
        with torch.inference_mode():
            try:
                found = [self._embed(**probe), self._embed(**{**probe, "token_type_ids": None})]
                plain = [self._plain(**probe), self._plain(**{**probe, "token_type_ids": None})]
            except Exception:  # a module that is built otherwise
                return False
        return all(
            torch.allclose(one.float(), other.float(), rtol=2e-2, atol=2e-2)
            for one, other in zip(found, plain, strict=True)
        )


class _LayerChange(_Change):
    """A layer's first sum in the pass of the norm behind it, and its second one in the product before it."""

    def __init__(self, part: Any, names: Sequence[str], within: Sequence[_Change]) -> None:
        before, attention, after, gated = (getattr(part, name) for name in names)
        self._attention = attention
        self._within = within  # of the norm and of the gated network: with a residual to add

        def forward(hidden_states: torch.Tensor, **rest: Any) -> torch.Tensor:
            states = attention(before(hidden_states), **rest)[0]
            normal = after(states, hidden_states)  # states are the sum from here on
            return gated(normal, states)

        super().__init__(part, forward, len(after.weight))

    def is_alike(self) -> bool:
        # Attention computes a batch, which there is none of here. What it gives is made of what it is given.
        self._attention.forward = lambda hidden_states, **rest: (0.5 * hidden_states, None)
        for change in self._within:
            change.apply()
        try:
            return super().is_alike()
        finally:
            for change in self._within:
                change.undo()
            del self._attention.forward


def _layer_changes(network: torch.nn.Module, of_parts: dict[torch.nn.Module, _Change]) -> list[_LayerChange]:
    """Changes of layers in ``network`` whose norms have kernels; not of the last layer, which is for `head_only`."""
    changes = []
    for part in network.modules():
        children = dict(part.named_children())
        names = next((names for names in LAYER_PARTS if set(names) == children.keys()), None)
        within = [of_parts[children[name]] for name in names[2:] if children[name] in of_parts] if names else []
        if names and len(within) == 2 and isinstance(within[0].forward, Norm):
            changes.append(_LayerChange(part, names, within))
    return [change for change in changes[:-1] if change.is_alike()]


def _plus(linear: torch.nn.Module, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    output: torch.Tensor = linear(input) if residual is None else plus(linear, input, residual)
    return output


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
    has_weight = isinstance(getattr(part, "weight", None), torch.nn.Parameter)
    has_kernel = has_weight and part.weight.dtype in DTYPES and find_library() is not None
    if has_kernel and type(part) is torch.nn.LayerNorm and part.weight.dim() == 1:
        return _Change(part, Norm(part.weight, part.bias, part.eps, centred=True), len(part.weight))
    if has_weight and hasattr(part, "variance_epsilon"):
        norm = Norm(part.weight, None, part.variance_epsilon, centred=False) if has_kernel else _rms_norm(part)
        return _Change(part, norm, len(part.weight))
    if has_kernel and hasattr(part, "_norm") and hasattr(part, "eps"):  # Gemma's, whose weight is what 1 is added to
        return _Change(part, Norm(1 + part.weight.float(), None, part.eps, centred=False), len(part.weight))
    if names >= EMBEDDINGS and _are_plain(part) and find_library() is not None:
        norm = part.LayerNorm
        return _EmbeddingsChange(part, Norm(norm.weight, norm.bias, norm.eps, centred=True))
    if {"gate_proj", "up_proj", "down_proj", "act_fn"} <= names:
        return _Change(
            part,
            lambda states, residual=None: _plus(
                part.down_proj, times(part.up_proj, states, part.act_fn(part.gate_proj(states))), residual
            ),
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


def _are_plain(embeddings: Any) -> bool:
    """Whether all that ``embeddings`` adds up is rows of tables as wide as its layer norm."""
    norm = embeddings.LayerNorm
    tables = [embeddings.get_submodule(name) for name in EMBEDDINGS - {"LayerNorm"}]
    return (
        type(norm) is torch.nn.LayerNorm
        and norm.weight.dtype in DTYPES
        and all(type(table) is torch.nn.Embedding and table.max_norm is None for table in tables)
        and {(table.embedding_dim,) for table in tables} == {norm.normalized_shape}
    )


def _rms_norm(part: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    weight, epsilon, width = part.weight, part.variance_epsilon, part.weight.shape[0]

    def forward(states: torch.Tensor) -> torch.Tensor:
        wide = states.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = size.square_().div_(width).add_(epsilon).rsqrt_()
        scaled = wide * scale if wide is states else wide.mul_(scale)
        return scaled.to(states.dtype).mul_(weight)

    return forward
