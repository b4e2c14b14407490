"""DeBERTa's attention within each pair of a packed batch, in the place of its own.

DeBERTa adds to the product of a query and a key two more, each with an embedding of how far apart their tokens are:

    query . key  +  query . key of the distance  +  key . query of the distance

transformers projects the distances' embeddings in each layer of each batch, multiplies every token with all 512 of
them, and gathers from that what is needed. Here they are projected once, since that depends on weights alone. A token
is multiplied with those distances only that its pair has, in their order, so that nothing is gathered: in a product of
tokens and distances the rows that a pair needs begin one column further left with each token, which is a matter of
strides.

    distances     2 1 0 -1 -2
    token 0           x  x  x      token 0 is 0, -1 and -2 tokens behind tokens 0, 1 and 2
    token 1         x x  x
    token 2       x x x
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from mp_rerank._engine.packed import LengthBucket, current_batch

__all__ = ["DisentangledAttention", "find_disentangled"]

#: by which transformers numbers the embeddings of distances, in the module of the attention
NUMBERING = "make_log_bucket_position"
KINDS = {"c2p", "p2c"}
#: Distances are laid out for at least so many tokens, and then for twice as many.
FEWEST_TOKENS = 64


def find_disentangled(base: torch.nn.Module) -> DisentangledAttention | None:
    """What changes the attention of ``base``, if that is DeBERTa's: with both products, and no convolution besides."""
    encoder: Any = getattr(base, "encoder", None)
    parts: list[Any] = [part for part in base.modules() if hasattr(part, "disentangled_attention_bias")]
    if not parts or not hasattr(encoder, "get_rel_embedding") or getattr(encoder, "conv", None) is not None:
        return None
    if not all(part.relative_attention and set(part.pos_att_type) == KINDS for part in parts):
        return None
    if not hasattr(sys.modules.get(type(parts[0]).__module__), NUMBERING):
        return None
    return DisentangledAttention(encoder, parts)


class DisentangledAttention:
    """Another attention for the layers of ``encoder``: of the packed batch that their thread computes."""

    def __init__(self, encoder: Any, parts: list[Any]) -> None:
        self._encoder = encoder
        self._parts = parts

    def apply(self) -> None:
        """Change the encoder."""
        with torch.inference_mode():
            distances = _Distances(self._parts[0])
            embeddings = self._encoder.get_rel_embedding()[: 2 * self._parts[0].pos_ebd_size]
            for part in self._parts:
                part.forward = _Attention(part, embeddings, distances)
        # Both would be of all tokens and all tokens. Nobody reads them now.
        self._encoder.get_attention_mask = lambda mask: mask
        self._encoder.get_rel_pos = lambda *states: None

    def undo(self) -> None:
        """Change it back."""
        for part in self._parts:
            vars(part).pop("forward", None)
        for name in ("get_attention_mask", "get_rel_pos"):
            vars(self._encoder).pop(name, None)


class _Distances:
    """Which embedding each distance has: of two tokens, the place of the first less that of the second."""

    def __init__(self, part: Any) -> None:
        self._number: Callable[..., torch.Tensor] = getattr(sys.modules[type(part).__module__], NUMBERING)
        self._span = part.pos_ebd_size
        self._buckets = part.position_buckets
        self._most = part.max_relative_positions

    def rows(self, distances: torch.Tensor) -> torch.Tensor:
        """The rows of the table of embeddings for ``distances``."""
        if self._buckets > 0:
            distances = self._number(distances, self._buckets, self._most).long()
        return (distances + self._span).clamp(0, 2 * self._span - 1)


class _Attention:
    """The ``forward`` of one layer's attention.

    Args:
        part: the attention of transformers.
        embeddings: of the distances, shape (2 * span, hidden size).
        distances: which of them is whose.
    """

    def __init__(self, part: Any, embeddings: torch.Tensor, distances: _Distances) -> None:
        self._part = part
        self._heads = part.num_attention_heads
        self._distances = distances
        to_key = part.key_proj if part.share_att_key else part.pos_key_proj
        to_query = part.query_proj if part.share_att_key else part.pos_query_proj
        self._scale = (part.attention_head_size * (1 + len(KINDS))) ** -0.5
        # Of each head, with the scale within: shape (heads, 2 * span, width).
        self._key, self._query = (
            (self._of_heads(project(embeddings)).transpose(0, 1).float() * self._scale).to(embeddings.dtype)
            for project in (to_key, to_query)
        )
        self._tokens = 0  # that the tables of distances are for

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> tuple[torch.Tensor, None]:
        """From states of shape (1, tokens, hidden size) to states of this shape."""
        packed = current_batch()
        packed.looks_ahead = True
        part = self._part
        every = hidden_states if packed.all_states is None else packed.all_states
        queries = self._of_heads(part.query_proj(hidden_states)[0])
        keys, values = (self._of_heads(project(every)[0]) for project in (part.key_proj, part.value_proj))
        found = torch.empty_like(queries)
        found[packed.count :] = 0  # what fills the row up; of chosen ones there are fewer
        for bucket in packed.buckets:
            if bucket.padded_length > self._tokens:
                self._lay_out(bucket.padded_length)
            asked, answers = keys.index_select(0, bucket.keys), values.index_select(0, bucket.keys)
            if packed.all_states is None:
                asking = queries.index_select(0, bucket.asking)
                attended = self._attend(bucket, asking, asked, answers, self._bias(bucket, asking, asked))
                found[bucket.span] = attended.index_select(0, bucket.real)
            else:
                pairs = bucket.ends[1]
                asking = queries.index_select(0, pairs)
                found[pairs] = self._attend(bucket, asking, asked, answers, self._bias_of_first(bucket, asking, asked))
        return found.flatten(1)[None], None

    def _of_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self._heads, -1))

    def _attend(
        self, bucket: LengthBucket, asking: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        """Attention of tokens within a bucket's pairs: shapes (tokens, heads, width)."""
        pairs = len(bucket.lengths)
        query, key, value = (states.unflatten(0, (pairs, -1)).transpose(1, 2) for states in (asking, keys, values))
        attended = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=self._scale
        )
        return attended.transpose(1, 2).flatten(0, 1)

    def _bias(self, bucket: LengthBucket, asking: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What is added to products of queries and keys: shape (pairs, heads, asking, keys)."""
        length, pairs = bucket.padded_length, len(bucket.lengths)
        of_keys, of_queries = (
            torch.bmm(states.transpose(0, 1), table[:, self._tokens - length : self._tokens + length].transpose(1, 2))
            for states, table in ((asking, self._falling), (keys, self._rising))
        )
        if len(bucket.real) < len(bucket.keys):
            of_queries.index_fill_(1, _padding(bucket).nonzero()[:, 0], -torch.inf)
        width = 2 * length
        bias, turned = (
            products.as_strided(
                (pairs, self._heads, length, length),
                (length * width, pairs * length * width, width - 1, 1),
                length - 1,
            )
            for products in (of_keys, of_queries)
        )
        return bias.add_(turned.transpose(2, 3))

    def _bias_of_first(self, bucket: LengthBucket, asking: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The same where each pair's first token alone asks."""
        length = bucket.padded_length
        own = slice(self._tokens - 1, self._tokens - 1 + length)  # distances 0, -1, ...
        bias = torch.bmm(asking.transpose(0, 1), self._falling[:, own].transpose(1, 2)).transpose(0, 1)
        rows = self._rising[:, self._tokens - length : self._tokens].flip(1).transpose(0, 1)
        bias = bias + (keys.unflatten(0, (-1, length)) * rows).sum(-1).transpose(1, 2)
        return bias.masked_fill(_padding(bucket).view(-1, 1, length), -torch.inf)[:, :, None]

    def _lay_out(self, tokens: int) -> None:
        """Make tables of distances for pairs of so many tokens: shape (heads, 2 * tokens, width)."""
        size = FEWEST_TOKENS
        while size < tokens:
            size *= 2
        self._tokens = size
        rising = torch.arange(1 - size, size + 1)
        self._falling = self._key.index_select(1, self._distances.rows(-rising))
        self._rising = self._query.index_select(1, self._distances.rows(rising))


def _padding(bucket: LengthBucket) -> torch.Tensor:
    """Which of a bucket's keys is padding, shape (keys,)."""
    return (torch.arange(bucket.padded_length) >= bucket.lengths[:, None]).flatten()
