"""A layer of BERT's or of ModernBERT's family as one function: some calls of kernels, and next to nothing between them.

transformers computes a layer in a dozen modules and thirty operators. Beside kernels for AMX, those took a tenth of the
time of MiniLM-L6 in bfloat16. Here a layer calls its kernels itself, those that its parts call where layers are
computed together, so that its numbers are the same to the last bit: each layer is proved to give them. The last layer
is left as it is, of which `head_only` computes few tokens.

All layers of a batch write to the same memory, which the core still has near: what one gives lives until the next one
is computed. Where a layer is called otherwise than within a packed batch, or somebody listens to it, it does what it
did before.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from mp_rerank._engine import fused
from mp_rerank._engine.amx import attention as tiles
from mp_rerank._engine.amx.linear import BLOCK, TiledProduct
from mp_rerank._engine.amx.rows import Norm, rotate
from mp_rerank._engine.attention import Rule
from mp_rerank._engine.packed import PackedBatch, attending_by, batch_here
from mp_rerank._engine.parity import Scores, keep_if_equal
from mp_rerank._engine.prepack import PackedLinear
from mp_rerank._engine.unpad import encoder_layers

__all__ = ["whole_layers"]

logger = logging.getLogger(__name__)

#: what a layer may be called with besides, and then is not computed as a whole
UNKNOWN = ("encoder_hidden_states", "cache", "past_key_values", "past_key_value")
Memory = dict[str, torch.Tensor]


def whole_layers(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let each layer of ``network`` be computed as a whole, if scores stay the same.

    Args:
        network: one whose attention, linear layers and norms are kernels for AMX, and whose layers are computed
            together; changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it; ``None``: scores are known to stay the same.

    Returns:
        Why they are not; empty: they are.
    """
    layers = [layer for part in encoder_layers(network)[:-1] if (layer := _whole(part))]
    if not layers:
        return "it has no layers of BERT's or ModernBERT's family with all their parts in kernels"

    def change() -> None:
        for layer in layers:
            if predict:
                layer.prove()
            layer.apply()

    def undo() -> None:
        for layer in layers:
            layer.undo()

    def predict_whole() -> Scores:
        assert predict is not None
        scores = predict()
        if any(layer.applied and not layer.used for layer in layers):
            raise ValueError("its layers are not called as is known here")
        return scores

    return keep_if_equal("whole layers", change, undo, predict and predict_whole, dtype)


def _whole(part: torch.nn.Module) -> _Layer | None:
    """``part`` as a whole layer; ``None``: it is of no kind known here, or not all its parts are kernels."""
    names = {name for name, _ in part.named_children()}
    kind = next((kind for kind in (_BertLayer, _ModernBertLayer) if names == kind.PARTS), None)
    if kind is None or any(inner._forward_hooks or inner._forward_pre_hooks for inner in part.modules()):
        return None
    if getattr(vars(part).get("forward"), "__module__", fused.__name__) != fused.__name__:  # somebody else's
        return None
    try:
        return kind(part)
    except Exception:  # a module that is built otherwise
        logger.debug("no whole layer", exc_info=True)
        return None


def _product(linear: torch.nn.Module) -> TiledProduct:
    """The product of a packed linear layer, or ``ValueError``."""
    packed = vars(linear).get("forward")
    if not isinstance(packed, PackedLinear) or packed.is_joined or not isinstance(packed.product, TiledProduct):
        raise ValueError("a linear layer is not packed into tiles")
    return packed.product


def _norm(part: torch.nn.Module) -> Norm:
    """The kernel of a norm, or ``ValueError``."""
    norm = vars(part).get("forward")
    if not isinstance(norm, Norm):
        raise ValueError("a norm has no kernel")
    return norm


class _Layer:
    """In place of the ``forward`` of ``part``, a layer.

    Attributes:
        PARTS: the names of its parts.
        used: whether it was ever computed as a whole.
    """

    PARTS: frozenset[str]

    def __init__(self, part: Any, first: TiledProduct, heads: int, scaling: float) -> None:
        self._part = part
        self._width, self._dtype = first.depth, first.dtype
        self._heads = heads
        self._scaling = scaling
        self._replaced = vars(part).get("forward")
        self._plain: Callable[..., torch.Tensor] = part.forward
        self.used = False

    @property
    def applied(self) -> bool:
        """Whether it is in that place."""
        return vars(self._part).get("forward") is self

    def apply(self) -> None:
        self._part.forward = self

    def undo(self) -> None:
        vars(self._part).pop("forward", None)
        if self._replaced is not None:
            self._part.forward = self._replaced

    def prove(self) -> None:
        """Raise ``ValueError`` unless this gives what the layer did, on tokens enough for all threads."""
        rows = BLOCK * torch.get_num_threads()
        batch = PackedBatch(torch.arange(rows) < torch.tensor([[rows - 7], [8]]))
        batch.in_tiles = batch.rotates = True
        rule = Rule(lambda pair, head, asking, key: asking - key >= 1 - rows)
        generator = torch.Generator().manual_seed(0)
        states = torch.randn(1, len(batch.sources), self._width, generator=generator).to(self._dtype)
        with torch.inference_mode(), attending_by(batch):
            rest = self._probe(batch.positions)
            expected = self._plain(states.clone(), attention_mask=rule, **rest)
            found = self(states, attention_mask=rule, **rest)
        if not self.used or not torch.equal(found[:, : batch.count], expected[:, : batch.count]):
            raise ValueError("a layer as a whole gives other numbers")
        self.used = False

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> torch.Tensor:
        batch = batch_here()
        mask, *others = args or (rest.get("attention_mask"),)
        if (
            isinstance(batch, PackedBatch)
            and batch.in_tiles
            and batch.all_states is None
            and not self._part._forward_hooks
            and all(value is None for value in (*others, *(rest.get(name) for name in UNKNOWN)))
            and isinstance(mask, Rule)
            and (band := mask.band())
        ):
            states = hidden_states[0]
            key = type(self), states.shape, states.dtype, self._heads
            if key not in batch.buffers:
                batch.buffers[key] = self._memory(states, batch.count)
            output = self._compute(states, batch.buffers[key], batch, band, rest)
            if output is not None:
                self.used = batch.used_tiles = True
                return output[None]
        return self._plain(hidden_states, *args, **rest)

    def _probe(self, positions: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        """What else the layer is called with, for tokens at these positions."""
        return {}

    def _memory(self, states: torch.Tensor, count: int) -> Memory:
        """Where layers of this kind write, for a batch of ``states``, of which the first ``count`` mean something."""
        raise NotImplementedError

    def _compute(
        self, states: torch.Tensor, memory: Memory, batch: PackedBatch, band: tiles.Band, rest: dict[str, Any]
    ) -> torch.Tensor | None:
        """What the layer makes of ``states``, shape (tokens, width), in ``memory["states"]``; ``None``: it cannot."""
        raise NotImplementedError

    def _common_memory(self, states: torch.Tensor, count: int) -> Memory:
        found = torch.empty_like(states)
        found[count:] = 0  # nobody writes there, and of a pair without tokens one of these is read
        return {"states": torch.empty_like(states), "found": found, "found by heads": self._by_heads(found)}

    def _attend(self, memory: Memory, batch: PackedBatch, band: tiles.Band) -> None:
        query, key, value = (memory[f"{name} by heads"] for name in ("query", "key", "value"))
        tiles.attend(query, key, value, batch.segments, band, self._scaling, memory["found by heads"])

    def _by_heads(self, states: torch.Tensor) -> torch.Tensor:
        """``states``, shape (tokens, width), as (tokens, heads, width of a head)."""
        return states.unflatten(1, (self._heads, -1))


class _BertLayer(_Layer):
    """Attention, a sum and its norm; two linear layers, a sum and its norm."""

    PARTS = frozenset(("attention", "intermediate", "output"))

    def __init__(self, part: Any) -> None:
        attention, output = part.attention.self, part.attention.output
        first = _product(attention.query)
        super().__init__(part, first, int(attention.num_attention_heads), float(attention.scaling))
        self._query, self._key, self._value, self._dense, self._up, self._down = map(
            _product,
            [
                *(attention.query, attention.key, attention.value),
                output.dense,
                part.intermediate.dense,
                part.output.dense,
            ],
        )
        self._norms = _norm(output.LayerNorm), _norm(part.output.LayerNorm)
        together = self._query.can_stand_beside([self._key, self._value]) and self._up.can_feed(self._down)
        if not together or not vars(part.intermediate.dense)["forward"].activation:
            raise ValueError("its parts do not fit together")

    def _memory(self, states: torch.Tensor, count: int) -> Memory:
        memory = self._common_memory(states, count)
        for name in ("query", "key", "value"):
            memory[name] = torch.empty_like(states)
            memory[f"{name} by heads"] = self._by_heads(memory[name])
        return memory

    def _compute(
        self, states: torch.Tensor, memory: Memory, batch: PackedBatch, band: tiles.Band, rest: dict[str, Any]
    ) -> torch.Tensor | None:
        projections = [memory[name] for name in ("query", "key", "value")]
        self._query.side_by_side([self._key, self._value], states, projections)
        self._attend(memory, batch, band)
        attended = self._dense(memory["found"], states, "add", memory["query"])  # which has been read
        attended = self._norms[0](attended, into=attended)
        output = self._up.feed(self._down, attended, attended, memory["states"])  # and so have this layer's states
        return self._norms[1](output, into=output)


class _ModernBertLayer(_Layer):
    """A norm, turned attention and a sum; a norm, a gated network and a sum."""

    PARTS = frozenset(("attn_norm", "attn", "mlp_norm", "mlp"))

    def __init__(self, part: Any) -> None:
        attention, gated = part.attn, part.mlp
        self._head_width = int(attention.head_dim)
        heads = attention.Wo.in_features // self._head_width
        super().__init__(part, _product(attention.Wqkv), heads, self._head_width**-0.5)
        self._projections, self._dense, self._up, self._down = map(
            _product, (attention.Wqkv, attention.Wo, gated.first, gated.Wo)
        )
        self._norm = None if type(part.attn_norm) is torch.nn.Identity else _norm(part.attn_norm)
        self._norm_of_sum = _norm(part.mlp_norm)
        if not self._up.is_gated or not self._up.can_feed(self._down):
            raise ValueError("its parts do not fit together")

    def _probe(self, positions: torch.Tensor) -> dict[str, torch.Tensor | tuple[torch.Tensor, ...]]:
        angles = positions[:, None] * torch.linspace(1, 0.01, self._head_width // 2)
        turns = torch.cat([angles, angles], dim=1)[None]
        return {"position_embeddings": (turns.cos().to(self._dtype), turns.sin().to(self._dtype))}

    def _memory(self, states: torch.Tensor, count: int) -> Memory:
        memory = self._common_memory(states, count)
        tokens, width = states.shape
        memory["projections"] = projections = states.new_empty(tokens, 3 * width)
        for name, part in zip(("query", "key", "value"), projections.chunk(3, dim=1), strict=True):
            memory[f"{name} by heads"] = by_heads = self._by_heads(part)
            memory[f"{name} as rotated"] = by_heads.transpose(0, 1)[None]
        memory["normal"], memory["sums"] = torch.empty_like(states), torch.empty_like(states)
        return memory

    def _compute(
        self, states: torch.Tensor, memory: Memory, batch: PackedBatch, band: tiles.Band, rest: dict[str, Any]
    ) -> torch.Tensor | None:
        normal = states if self._norm is None else self._norm(states, into=memory["normal"])
        self._projections(normal, into=memory["projections"])
        turns = rest.get("position_embeddings")
        if turns is None or not rotate(memory["query as rotated"], memory["key as rotated"], *turns):
            return None
        self._attend(memory, batch, band)
        sums = self._dense(memory["found"], into=memory["sums"])
        normal = self._norm_of_sum(sums, states, memory["normal"])
        return self._up.feed(self._down, normal, sums, memory["states"])
