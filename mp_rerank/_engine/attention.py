"""Attention within each pair of a packed batch, in the place of a model's own.

transformers calls attention, and what makes its masks, through interfaces. Registered there under ``NAME``, the
functions below go by the ``PackedBatch`` of their thread. On a CPU with AMX a kernel takes it as it is (``amx``), where
the model's own mask is a band. Else each of its buckets is a padded batch to torch's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from mp_rerank._engine.amx import attention as tiles
from mp_rerank._engine.amx.attention import ANY, Band
from mp_rerank._engine.packed import LengthBucket, current_batch

__all__ = ["NAME", "UNKNOWN", "Rule", "check_call", "register", "register_attention"]

#: the name under which transformers finds this attention
NAME = "mp_rerank_packed"
#: of the layers that make keys and values, in models of BERT's and of DistilBERT's family
KEY_VALUE_NAMES = (("key", "value"), ("k_lin", "v_lin"))
#: what attention may be asked for besides, and is not done here
UNKNOWN = ("s_aux", "position_bias")


@dataclass(eq=False)
class Rule:
    """Which tokens of a pair may attend to which, by their positions in it: the model's own mask function.

    Layers of one kind (global, or with a sliding window) are given the same rule.
    """

    allows: Callable[..., Any]
    _masks: dict[LengthBucket, tuple[torch.Tensor | None, bool]] = field(default_factory=dict)
    _bands: list[Band | None] = field(default_factory=list)

    def band(self) -> Band | None:
        """The band of positions that a token attends to, if that is all there is to the rule."""
        if not self._bands:
            packed = current_batch()
            band = self._find_band(max(bucket.before + bucket.padded_length for bucket in packed.buckets))
            packed.looks_ahead |= band is not None and band.after > 0
            self._bands.append(band)
        return self._bands[0]

    def _find_band(self, longest: int) -> Band | None:
        places = torch.arange(longest)
        allowed = self._allowed(places[:, None], places)
        after, before = int(allowed[0].sum()) - 1, int(allowed[-1].sum()) - 1
        if not torch.equal(allowed, torch.ones_like(allowed).tril_(after).triu_(-before)):
            return None
        return Band(*(ANY if distance == longest - 1 else distance for distance in (before, after)))

    def mask(self, bucket: LengthBucket, dtype: torch.dtype) -> tuple[torch.Tensor | None, bool]:
        """The mask for a bucket, of a shape that expands to (segments, 1, asking, keys), and whether it is a triangle.

        It is added to products: 0 where tokens may be attended to, else -inf. torch would make that of truth values
        anew in every layer. ``None``: all may be attended to, or all in a triangle.
        """
        if bucket not in self._masks:
            allowed, causal = self._make(bucket)
            self._masks[bucket] = (None if allowed is None else _additive(allowed, dtype)), causal
        return self._masks[bucket]

    def _make(self, bucket: LengthBucket) -> tuple[torch.Tensor | None, bool]:
        keys = torch.arange(bucket.before + bucket.padded_length)
        asking = keys[bucket.before :, None]
        allowed = self._allowed(asking, keys)
        looks_ahead = bool((allowed & (keys > asking)).any())
        current_batch().looks_ahead |= looks_ahead
        # Behind a segment's tokens is padding. Who looks at earlier tokens only does not see it.
        if looks_ahead and len(bucket.real) < len(bucket.asking):
            real = (keys < bucket.before + bucket.lengths[:, None])[:, None, None, :]
            return (real if bool(allowed.all()) else allowed & real), False
        if bool(allowed.all()):
            return None, False
        if not bucket.before and bool((allowed == (keys <= asking)).all()):
            return None, True
        return allowed[None, None], False

    def mask_of_chosen(
        self, bucket: LengthBucket, which: torch.Tensor, asking: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The mask for one asking token of each of the segments ``which``, shape (segments, 1, 1, keys).

        Args:
            asking: their positions in their pairs.
        """
        keys = torch.arange(bucket.before + bucket.padded_length)
        real = keys < bucket.before + bucket.lengths[which, None]
        return _additive((self._allowed(asking[:, None], keys) & real)[:, None, None, :], dtype)

    def _allowed(self, asking: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros((), dtype=torch.long)
        allowed: torch.Tensor = self.allows(zero, zero, asking, keys)
        return allowed.expand(len(asking), len(keys))


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def register_attention() -> None:
    """Let models of transformers find this attention, and its masks, under ``NAME``."""
    register(NAME, _attend, _make_rule)


def register(name: str, attend: Callable[..., Any], make_mask: Callable[..., Any]) -> None:
    """Let models of transformers find ``attend`` under ``name``, and what gives it its masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, make_mask)


def check_call(module: torch.nn.Module, mask: object, kind: type, rest: dict[str, Any], unknown: Sequence[str]) -> None:
    """Raise ``ValueError`` if ``module`` asks for attention with a mask of another kind, or with what is unknown."""
    if not isinstance(mask, kind):
        raise ValueError(f"{type(module).__name__} makes masks of its own")
    for name in unknown:
        if rest.get(name) is not None:
            raise ValueError(f"{type(module).__name__} asks for attention with {name}")


def _make_rule(*args: Any, mask_function: Callable[..., Any], **rest: Any) -> Rule:
    """In place of a mask: what it is made of."""
    return Rule(mask_function)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair: tensors of shape (1, heads, tokens, width) to one of (1, tokens, heads, width)."""
    check_call(module, attention_mask, Rule, rest, UNKNOWN)
    packed = current_batch()
    if packed.all_states is not None and query.shape[2] != packed.all_states.shape[1]:
        heads, width = query.shape[1], query.shape[3]
        key, value = (
            project(packed.all_states).view(1, -1, heads, width).transpose(1, 2)
            for project in _key_value_layers(module)
        )
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if packed.in_tiles and softcap is None and tiles.takes(queries, keys, values) and (band := attention_mask.band()):
        packed.used_tiles = True
        if packed.all_states is None:
            segments = packed.segments
        else:
            segments = packed.segments_of_chosen if len(queries) == len(keys) else packed.segments_of_pairs
        found = tiles.attend(queries, keys, values, segments, band, scaling)
        found[packed.count :] = 0  # what fills the row up
        if packed.empty and len(queries) != len(keys):
            found[packed.empty] = 0
        return found[None], None
    grouped = queries.shape[1] != keys.shape[1]
    attend = torch.nn.functional.scaled_dot_product_attention if softcap is None else partial(_softcapped, softcap)
    found = queries.new_empty(queries.shape)
    if packed.all_states is None:
        found[packed.count :] = 0  # what fills the row up; of chosen ones, nobody reads the others
    for bucket in packed.buckets:
        longest = bucket.before + bucket.padded_length
        keep = bucket.keys
        if packed.all_states is not None:
            assert packed.chosen is not None
            which, pairs = bucket.ends
            if not len(which):
                continue
            if len(which) < len(bucket.lengths):
                keep = keep.view(-1, longest)[which].flatten()
            chosen = packed.chosen[pairs]
            mask: torch.Tensor | None
            mask, causal = (
                attention_mask.mask_of_chosen(bucket, which, packed.positions[chosen], query.dtype),
                False,
            )
            where = chosen if len(queries) == len(keys) else pairs
            ask = queries[where, None]
        else:
            mask, causal = attention_mask.mask(bucket, query.dtype)
            ask = queries.index_select(0, bucket.asking).unflatten(0, (-1, bucket.padded_length))
        attended = attend(
            ask.transpose(1, 2),
            keys.index_select(0, keep).unflatten(0, (-1, longest)).transpose(1, 2),
            values.index_select(0, keep).unflatten(0, (-1, longest)).transpose(1, 2),
            attn_mask=mask,
            is_causal=causal,
            scale=scaling,
            **({"enable_gqa": True} if grouped else {}),
        )
        answers = attended.transpose(1, 2).flatten(0, 1)
        if packed.all_states is not None:
            found[where] = answers
        else:
            found[bucket.span] = answers.index_select(0, bucket.real)
    return found[None], None


def _softcapped(
    softcap: float,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as torch's, but that the products of queries and keys stay within ``softcap``, as in Gemma 2."""
    if enable_gqa:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    products = query @ key.transpose(2, 3) * (query.shape[3] ** -0.5 if scale is None else scale)
    products = torch.tanh(products / softcap) * softcap
    if is_causal:
        attn_mask = _additive(torch.ones(products.shape[2:], dtype=torch.bool).tril(), products.dtype)
    if attn_mask is not None:
        products += attn_mask
    return products.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def _key_value_layers(attention: torch.nn.Module) -> list[torch.nn.Module]:
    return next(
        [attention.get_submodule(name) for name in names] for names in KEY_VALUE_NAMES if hasattr(attention, names[0])
    )
