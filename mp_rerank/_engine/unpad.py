"""Encoders without padding: a batch goes through their layers as one row of real tokens.

    padded batch  ->  PackedBatch: tokens of all pairs end to end  ->  layers  ->  padded batch, for the head

Linear layers, norms and activations see each token by itself. Only attention has to know which tokens belong together:
it is replaced, through transformers' attention interface, by one that goes by the ``PackedBatch`` of its thread.

``unpad`` does this to a network. After it, ``cls_only`` can leave out of the last layer what the head does not read.
Both work for networks whose encoder is a module of its own and whose attention goes through that interface: BERT,
RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT and DistilBERT in transformers 5. Any other network is left as it is, and so is
one whose scores would differ.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mp_rerank._engine.parity import Scores, keep_if_equal

__all__ = ["TOKEN_MULTIPLE", "LengthBucket", "PackedBatch", "cls_only", "unpad"]

#: the name under which transformers finds the attention below
NAME = "mp_rerank_packed"
#: A row has a multiple of so many tokens. oneDNN makes a kernel for every number of tokens and keeps it, and memory of
#: ever new sizes is fragmented: with a model of 18 MB a worker grew by 760 MB in 600 batches, and now by 100.
TOKEN_MULTIPLE = 32
#: In attention, a pair is padded to a multiple of this. Of a vector register that is not full, each number is computed
#: by itself, which takes twice as long for 31 or 63 tokens as for 32 or 64.
LENGTH_MULTIPLE = 16
#: of the encoder, in the base models of transformers
ENCODER_NAMES = ("encoder", "transformer")
#: of the layers that make keys and values, in models of BERT's and of DistilBERT's family
KEY_VALUE_NAMES = (("key", "value"), ("k_lin", "v_lin"))


# A network without padding.


def unpad(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> bool:
    """Let the encoder of ``network`` leave out padding, if scores stay the same.

    Args:
        network: a transformers model on a CPU; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it; ``None``: scores are known to stay the same.

    Returns:
        Whether it leaves out padding now.
    """
    encoder = _find_encoder(network)
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    if encoder is None or attention != "sdpa" or "forward" in vars(encoder):
        return False
    if not getattr(network, "_can_set_attn_implementation", bool)():  # setting it would do nothing and warn of it
        return False
    unpadded = _UnpaddedForward(encoder)

    def change() -> None:
        _register_attention()
        network.set_attn_implementation(NAME)
        encoder.forward = unpadded

    def undo() -> None:
        vars(encoder).pop("forward", None)
        network.set_attn_implementation(attention)

    def predict_unpadded() -> Scores:
        assert predict is not None
        scores = predict()
        if "forward" in vars(encoder) and not unpadded.used:
            raise ValueError("padding does not get as far as the encoder")
        return scores

    return keep_if_equal("no padding", change, undo, predict and predict_unpadded, dtype)


def cls_only(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> bool:
    """Let the last layer of ``network`` compute each pair's first token only, if scores stay the same.

    A head of BERT's family reads that token only ([CLS], or <s>). Its last state depends on the others through
    attention's keys and values, which are computed for all tokens; queries, attention, and all that follows, for the
    first tokens alone. Of the linear layers' products (of twelve parts, keys and values are two) that leaves out ten
    twelfths of the last layer: 28 % of a model with three layers, 14 % with six, 7 % with twelve.

    Args:
        network: one that `unpad` let leave out padding; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it; ``None``: scores are known to stay the same.

    Returns:
        Whether the last layer computes first tokens only now.
    """
    layers = getattr(_find_encoder(network), "layer", None)
    if not isinstance(layers, torch.nn.ModuleList) or "forward" in vars(layers[-1]):
        return False
    last = layers[-1]

    def change() -> None:
        last.forward = _ClsOnlyForward(last)

    return keep_if_equal("first tokens only", change, lambda: vars(last).pop("forward", None), predict, dtype)


class _UnpaddedForward:
    """The ``forward`` of an encoder: takes a padded batch, gives the layers a packed one, returns a padded one."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self._forward = encoder.forward
        self.used = False  # whether there has been any padding to leave out

    def __call__(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **rest: Any) -> Any:
        pairs, longest, _ = hidden_states.shape
        if attention_mask is None:
            attention_mask = hidden_states.new_ones((pairs, longest), dtype=torch.bool)
        real = attention_mask.bool()
        lengths, order = real.sum(1).sort()  # pairs of one length side by side
        real = real[order]
        packed = PackedBatch(lengths)
        states = hidden_states[order][real]
        count = len(states)
        row = torch.nn.functional.pad(states, (0, 0, 0, -count % TOKEN_MULTIPLE))
        with _attending_by(packed):
            output = self._forward(row.unsqueeze(0), None, **rest)
        tokens = output.last_hidden_state[0]
        padded = torch.zeros_like(hidden_states)
        if packed.all_states is None:
            padded[real] = tokens[:count]
        else:  # a first token of each pair: the head looks for it in the first column
            padded[:, 0] = tokens
        output.last_hidden_state = torch.empty_like(padded)
        output.last_hidden_state[order] = padded
        self.used |= count < pairs * longest
        return output


class _ClsOnlyForward:
    """The ``forward`` of a layer: takes states of shape (1, tokens, width), returns them of shape (1, pairs, width)."""

    def __init__(self, layer: torch.nn.Module) -> None:
        self._forward = layer.forward

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **rest: Any) -> Any:
        packed = _current_batch()
        packed.all_states = hidden_states
        return self._forward(hidden_states[:, packed.starts], *args, **rest)


def _find_encoder(network: torch.nn.Module) -> torch.nn.Module | None:
    base = getattr(network, "base_model", None)
    found = next((part for name in ENCODER_NAMES if (part := getattr(base, name, None)) is not None), None)
    return found if isinstance(found, torch.nn.Module) else None


# A packed batch.


@dataclass(frozen=True)
class LengthBucket:
    """Pairs of a packed batch that attention takes together, each padded to the same length.

    Attributes:
        pairs: which pairs of the batch.
        span: which tokens of the batch, from the first pair's first to the last pair's last.
        padded_length: of each pair, a multiple of `LENGTH_MULTIPLE`.
        tokens: for each place of the padded pairs, which token of the batch is in it; in padding, the pair's first.
            Shape (pairs * padded_length,).
        real: the places that are no padding, in order. Shape (tokens in the span,).
        mask: which places may be attended to, shape (pairs, 1, 1, padded_length); ``None`` where there is no padding.
    """

    pairs: slice
    span: slice
    padded_length: int
    tokens: torch.Tensor
    real: torch.Tensor
    mask: torch.Tensor | None


class PackedBatch:
    """Where the pairs of a batch are in a row of their tokens, end to end.

    Args:
        lengths: tokens of each pair, in the row's order, shortest first. Behind the last pair there may be tokens that
            mean nothing, to make their number a multiple of `TOKEN_MULTIPLE`.

    Attributes:
        starts: where in the row each pair begins.
        buckets: its pairs by their length.
        all_states: hidden states of all tokens, shape (1, tokens, width), while a layer is given only those of first
            tokens; its attention makes keys and values of these.
    """

    def __init__(self, lengths: torch.Tensor) -> None:
        ends = lengths.cumsum(0)
        self.starts = ends - lengths
        self.all_states: torch.Tensor | None = None
        self.buckets: list[LengthBucket] = []
        padded_lengths = -(-lengths // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        begin = 0
        sizes, counts = padded_lengths.unique_consecutive(return_counts=True)
        for padded_length, count in zip(sizes.tolist(), counts.tolist(), strict=True):
            pairs = slice(begin, begin + count)
            begin += count
            starts, numbers = self.starts[pairs, None], torch.arange(padded_length)
            mask = numbers < lengths[pairs, None]
            self.buckets.append(
                LengthBucket(
                    pairs=pairs,
                    span=slice(int(starts[0]), int(ends[pairs][-1])),
                    padded_length=padded_length,
                    tokens=torch.where(mask, starts + numbers, starts).flatten(),
                    real=mask.flatten().nonzero()[:, 0],
                    mask=None if bool(mask.all()) else mask[:, None, None, :],
                )
            )


_here = threading.local()  # .batch: the packed batch that this thread's encoder computes


def _current_batch() -> PackedBatch:
    """The packed batch that this thread's encoder computes; ``AttributeError`` where it computes none."""
    batch: PackedBatch = _here.batch
    return batch


@contextmanager
def _attending_by(batch: PackedBatch) -> Iterator[None]:
    """Within, attention on this thread goes by ``batch``."""
    _here.batch = batch
    try:
        yield
    finally:
        del _here.batch


# Attention within each pair of a packed batch.


def _register_attention() -> None:
    """Let models of transformers find this attention, and a mask for it, under ``NAME``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _pass_mask)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair: tensors of shape (1, heads, tokens, width) to one of (1, tokens, heads, width)."""
    packed = _current_batch()
    _, heads, asking, width = query.shape
    if packed.all_states is not None:
        key, value = (
            project(packed.all_states).view(1, -1, heads, width).transpose(1, 2)
            for project in _key_value_layers(module)
        )
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    found = query.new_zeros(asking, heads, width)
    first_only = packed.all_states is not None
    for bucket in packed.buckets:
        shape = -1, bucket.padded_length, heads, width
        ask = queries[bucket.pairs, None] if first_only else queries.index_select(0, bucket.tokens).view(shape)
        attended = torch.nn.functional.scaled_dot_product_attention(
            ask.transpose(1, 2),
            keys.index_select(0, bucket.tokens).view(shape).transpose(1, 2),
            values.index_select(0, bucket.tokens).view(shape).transpose(1, 2),
            attn_mask=bucket.mask,
            scale=scaling,
        )
        answers = attended.transpose(1, 2).reshape(-1, heads, width)
        if first_only:
            found[bucket.pairs] = answers
        else:
            found[bucket.span] = answers.index_select(0, bucket.real)
    return found[None], None


def _key_value_layers(attention: torch.nn.Module) -> list[torch.nn.Module]:
    return next(
        [attention.get_submodule(name) for name in names] for names in KEY_VALUE_NAMES if hasattr(attention, names[0])
    )


def _pass_mask(*args: Any, attention_mask: torch.Tensor | None = None, **rest: Any) -> torch.Tensor | None:
    """The mask as the tokenizer made it, of shape (pairs, longest): the encoder reads lengths from it."""
    return attention_mask
