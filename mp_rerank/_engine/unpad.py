"""Networks that leave out what they need not compute: padding, common beginnings, and what their head does not read.

``unpad`` lets a network compute a `PackedBatch`: at its input a padded batch becomes one row of tokens with their own
positions, and past its layers the row becomes a padded batch again, which is what the head reads. After it,
``attend_in_tiles`` lets the kernel for AMX compute attention, ``share_beginnings`` lets pairs that begin alike be
computed from where they differ, and ``head_only`` leaves out of the last layer what the head does not read.

All work for networks that take positions and whose attention and masks go through transformers' interfaces: in
transformers 5 BERT, RoBERTa, XLM-RoBERTa, ELECTRA, ALBERT, DistilBERT, ModernBERT, and decoders such as Llama, Qwen2,
Qwen3, Mistral and Gemma. Any other network is left as it is, and so is one whose scores would differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from mp_rerank._engine import attention as buckets
from mp_rerank._engine import varlen
from mp_rerank._engine.amx.attention import why_not_here
from mp_rerank._engine.disentangled import find_disentangled
from mp_rerank._engine.forward import UnpaddedForward
from mp_rerank._engine.packed import PackedBatch, attending_by, current_batch
from mp_rerank._engine.parity import Scores, keep_if_equal

__all__ = [
    "attend_in_tiles",
    "encoder_layers",
    "has_vocabulary_score",
    "head_only",
    "packing_forward",
    "score_logits",
    "share_beginnings",
    "unpad",
    "varlen_forward",
]

#: of the part that has the layers, in the base models of transformers; in others the layers are the base model's own
ENCODER_NAMES = ("encoder", "transformer")
#: of the list of layers in either
LAYERS_NAMES = ("layer", "layers")
#: A common beginning of fewer tokens is not worth a segment of its own.
SHORTEST_BEGINNING = 16
#: of what attention is given all states by, itself or the norm before it, and of the linear layer at its end; in layers
#: of other families attention makes keys and values of ``PackedBatch.all_states``
ATTENTION_NAMES = (("attn_norm", "attn.Wo"), ("input_layernorm", "self_attn.o_proj"), ("self_attn", "self_attn.o_proj"))


def unpad(
    network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None, *, as_varlen: bool = False
) -> str:
    """Let ``network`` leave out padding, if scores stay the same.

    Args:
        network: a transformers model on a CPU or a CUDA device; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it; ``None``: scores are known to stay the same.
        as_varlen: let it compute a `varlen.VarlenBatch` in place of a `PackedBatch`: on a GPU.

    Returns:
        Why it does not; empty: it does.
    """
    base = getattr(network, "base_model", None)
    attention = getattr(getattr(network, "config", None), "_attn_implementation", None)
    if not isinstance(base, torch.nn.Module) or "forward" in vars(base):
        return "this is no plain model of transformers"
    if attention != ("sdpa" if getattr(network, "_supports_sdpa", True) else "eager"):
        return f"its attention is {attention!r}, not transformers' own choice"
    disentangled = None if as_varlen else find_disentangled(base)
    # Setting it would do nothing and warn of it.
    if disentangled is None and not getattr(network, "_can_set_attn_implementation", bool)():
        return "its attention does not go through transformers' interface"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "it takes no positions"
    encoder = base if disentangled else _find_encoder(base)
    packing = (varlen.VarlenForward if as_varlen else _PackingForward)(base, unpacks=encoder is base)
    rules = varlen if as_varlen else buckets
    pooler = getattr(base, "pooler", None) if encoder is base else None

    def change() -> None:
        if disentangled:
            disentangled.apply()
        else:
            rules.register_attention()
            network.set_attn_implementation(rules.NAME)
        if encoder is not base:
            encoder.forward = _UnpackingForward(encoder)
        if pooler is not None:
            pooler.forward = _of_unpacked(pooler.forward)
        base.forward = packing

    def undo() -> None:
        for part in filter(None, (base, encoder, pooler)):
            vars(part).pop("forward", None)
        if disentangled:
            disentangled.undo()
        else:
            network.set_attn_implementation(attention)

    def predict_unpadded() -> Scores:
        assert predict is not None
        scores = predict()
        if "forward" in vars(base) and not packing.saved:
            raise ValueError("padding does not get as far as its layers")
        return scores

    return keep_if_equal("no padding", change, undo, predict and predict_unpadded, dtype)


def attend_in_tiles(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let attention of ``network`` be computed by the kernel for CPUs with AMX, if scores stay the same.

    That has a proof of its own, after `unpad`'s: where the kernel's scores differ, padding is still left out.

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
    why_not = why_not_here(getattr(torch, dtype))
    if why_not:
        return why_not

    def change() -> None:
        packing.in_tiles = True

    def undo() -> None:
        packing.in_tiles = False

    def predict_in_tiles() -> Scores:
        assert predict is not None
        scores = predict()
        if packing.in_tiles and not packing.used_tiles:
            raise ValueError("its attention is of a kind that there is no kernel for")
        return scores

    return keep_if_equal("attention in tiles", change, undo, predict and predict_in_tiles, dtype)


def share_beginnings(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let ``network`` compute once what pairs of a batch have in common at their beginnings, if scores stay the same.

    What a token computes depends on those that it attends to: in a decoder, on earlier ones alone.

    Args:
        network: one that `unpad` let leave out padding; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs that begin alike with it; ``None``: scores are known to stay the same.

    Returns:
        Why it does not; empty: it does.
    """
    packing = packing_forward(network)
    if packing is None:
        return "it computes padding"
    if predict is not None and packing.looks_ahead:
        return "its tokens attend to later ones too"

    def change() -> None:
        packing.shortest = 1 if predict else SHORTEST_BEGINNING

    def undo() -> None:
        packing.shortest = 0

    def predict_sharing() -> Scores:
        assert predict is not None
        before = packing.shared
        scores = predict()
        if packing.shortest and packing.shared == before:
            raise ValueError("pairs do not begin alike, or have more than tokens")
        return scores

    why_not = keep_if_equal("common beginnings once", change, undo, predict and predict_sharing, dtype)
    if not why_not:
        packing.shortest = SHORTEST_BEGINNING
    return why_not


def head_only(network: torch.nn.Module, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let the last layer of ``network`` compute only what the head reads, one token a pair, if scores stay the same.

    A head of BERT's family reads a pair's first token ([CLS], or <s>), a decoder's head the last one. That token's
    state depends on others through attention's keys and values, which are computed for all tokens; attention, and all
    that follows, for that one token alone. Of the linear layers' products that leaves out most of the last layer: 28 %
    of a model with three layers, 14 % with six, 7 % with twelve.

    Args:
        network: one that `unpad` let leave out padding; changed in place, or not at all.
        dtype: of its weights.
        predict: scores one batch of pairs of unlike lengths with it; ``None``: scores are known to stay the same.

    Returns:
        Why it does not; empty: it does.
    """
    packing = packing_forward(network)
    if packing is None:
        return "it computes padding"
    layers = encoder_layers(network)
    if len(layers) < 2 or "forward" in vars(layers[-1]):
        return "it has no list of layers"
    last = layers[-1]
    parts = dict(last.named_modules())
    ends = [(parts[entry], parts[end]) for entry, end in ATTENTION_NAMES if entry in parts and end in parts]
    replaced: list[torch.nn.Module] = []

    def replace(part: torch.nn.Module, forward: Callable[..., Any]) -> None:
        replaced.append(part)
        part.forward = forward

    def change() -> None:
        plain = last.forward
        replace(last, lambda hidden_states, *args, **rest: plain(_only_chosen(hidden_states), *args, **rest))
        for entry, end in ends[:1]:
            replace(entry, _of_all(entry.forward))
            replace(end, _of_chosen(end.forward))

    def undo() -> None:
        for part in replaced:
            vars(part).pop("forward", None)

    return keep_if_equal("the head's tokens only", change, undo, predict, dtype)


def has_vocabulary_score(model: Any) -> bool:
    """Whether the score of ``model``, a ``CrossEncoder``, is made of logits of a decoder's vocabulary."""
    return _vocabulary_reader(model) is not None


def score_logits(model: Any, dtype: str, predict: Callable[[], Scores] | None) -> str:
    """Let a decoder compute only those logits of its vocabulary that ``LogitScore`` reads, if scores stay the same.

    Args:
        model: a ``CrossEncoder``; changed in place, or not at all.
        dtype: of its weights.
        predict: scores some fixed pairs with it; ``None``: scores are known to stay the same.

    Returns:
        Why it does not; empty: it does.
    """
    reader = _vocabulary_reader(model)
    if reader is None:
        return "its score is made of no vocabulary's logits"
    network = model.model
    head = network.get_output_embeddings()
    if type(head) is not torch.nn.Linear or "forward" in vars(head):
        return "its logits are made by something else than a linear layer"
    read = {name: getattr(reader, name) for name in ("true_token_id", "false_token_id")}
    ids = [token for token in read.values() if token is not None]
    weight = head.weight.detach()[ids].clone()
    bias = None if head.bias is None else head.bias.detach()[ids].clone()

    def change() -> None:
        head.forward = lambda states: torch.nn.functional.linear(states, weight, bias)
        for number, name in enumerate(name for name, token in read.items() if token is not None):
            setattr(reader, name, number)

    def undo() -> None:
        vars(head).pop("forward", None)
        for name, token in read.items():
            setattr(reader, name, token)

    return keep_if_equal("the score's logits only", change, undo, predict, dtype)


class _PackingForward(UnpaddedForward):
    """Gives a base model's parts the `PackedBatch` of a padded batch.

    Attributes:
        shortest: the shortest common beginning that is computed once; 0: none.
        in_tiles: whether attention may use the kernel for CPUs with AMX.
        used_tiles: whether it did.
        rotates: whether rotary positions are computed in fewer passes (``fused``).
        looks_ahead: whether some of its tokens attend to later ones.
        shared: tokens left out so far since they were common.
    """

    def __init__(self, base: torch.nn.Module, *, unpacks: bool) -> None:
        super().__init__(base, unpacks=unpacks)
        self.shortest = 0
        self.in_tiles = False
        self.used_tiles = False
        self.rotates = False
        self.looks_ahead = True
        self.shared = 0

    def _unpadded(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None, rest: dict[str, Any]) -> Any:
        shares = self.shortest and "token_type_ids" not in self._parameters
        packed = PackedBatch(mask, ids if shares else None, self.shortest)
        packed.in_tiles = self.in_tiles
        packed.rotates = self.rotates
        self.saved += packed.saved
        self.shared += packed.shared
        numbered = self._positions(ids)
        positions = packed.positions if numbered is None else numbered.flatten()[packed.sources]
        of_row = None if types is None else types.flatten()[packed.sources]
        with attending_by(packed):
            output = self._compute(packed, ids.flatten()[packed.sources], of_row, positions, rest)
        self.looks_ahead = packed.looks_ahead
        self.used_tiles = packed.used_tiles
        return output


class _UnpackingForward:
    """The ``forward`` of an encoder within a base model: returns what the pooler and the head read, a padded batch."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        self._forward = encoder.forward

    def __call__(self, *args: Any, **rest: Any) -> Any:
        output = self._forward(*args, **rest)
        output.last_hidden_state = current_batch().unpack(output.last_hidden_state)
        return output


def _of_unpacked(pooler: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda states: pooler(current_batch().unpack(states))


def _only_chosen(hidden_states: torch.Tensor) -> torch.Tensor:
    """The states that the last layer is given, and all set aside for its attention."""
    packed = current_batch()
    packed.all_states = hidden_states
    return hidden_states[:, packed.choose("first" if packed.looks_ahead else "last")]


def _of_all(part: Callable[..., Any]) -> Callable[..., Any]:
    def forward(hidden_states: torch.Tensor, *args: Any, **rest: Any) -> Any:
        return part(current_batch().all_states, *args, **rest)

    return forward


def _of_chosen(linear: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        return linear(input[:, current_batch().chosen])

    return forward


def varlen_forward(network: torch.nn.Module) -> varlen.VarlenForward | None:
    """What `unpad` has put into ``network``, a model on a GPU, if it has."""
    forward = vars(getattr(network, "base_model", network)).get("forward")
    return forward if isinstance(forward, varlen.VarlenForward) else None


def packing_forward(network: torch.nn.Module) -> _PackingForward | None:
    """What `unpad` has put into ``network``, if it has."""
    forward = vars(getattr(network, "base_model", network)).get("forward")
    return forward if isinstance(forward, _PackingForward) else None


def _vocabulary_reader(model: Any) -> Any:
    parts = model.modules() if isinstance(model, torch.nn.Module) else ()
    return next((part for part in parts if type(part).__name__ == "LogitScore"), None)


def _find_encoder(base: torch.nn.Module) -> torch.nn.Module:
    """The part of ``base`` that has the layers: itself, where none of its parts has."""
    parts = (getattr(base, name, None) for name in ENCODER_NAMES)
    return next((part for part in parts if isinstance(part, torch.nn.Module)), base)


def encoder_layers(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of ``network``, first to last; none, if it has no list of them under a name known here."""
    encoder = _find_encoder(network.base_model)
    found = (getattr(encoder, name, None) for name in LAYERS_NAMES)
    return list(next((layers for layers in found if isinstance(layers, torch.nn.ModuleList)), []))
