"""On a GPU: a batch as one row of tokens, attention by the bounds of its pairs, a CUDA graph for each size of a row.

    tokens of a batch  ->  VarlenBatch  ->  layers, attention within bounds  ->  the token read of each pair  ->  head

An H200 computes MiniLM-L6's layers for 200 pairs in 1.8 ms, and Python takes 2.5 ms to launch their kernels one by one,
4.5 ms for a padded batch. A CUDA graph is launched at once, in 0.01 ms. It is made for one number of tokens, of pairs,
and of tokens of the longest pair; so these are rounded up, and a graph is made when its size is first needed, in about
20 ms.

Attention takes the bounds as numbers in the GPU's memory (``torch.nn.attention.varlen``, or in float32 the operator
below torch's memory-efficient attention), so that one graph is right for pairs of any lengths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from cachetools import LRUCache

from mp_rerank._engine.attention import UNKNOWN, check_call, register
from mp_rerank._engine.forward import UnpaddedForward
from mp_rerank._engine.packed import attending_by, batch_here

__all__ = ["GRAPHS", "Heads", "VarlenBatch", "VarlenForward", "VarlenNetwork", "register_attention"]

logger = logging.getLogger(__name__)

#: the name under which transformers finds this attention
NAME = "mp_rerank_varlen"
#: CUDA graphs that are kept at most: those used last.
GRAPHS = 64
#: Attention works on blocks of so many tokens; a graph's longest pair is a power of two from here on.
SHORTEST_BOUND = 128
#: Of the tokens that may attend, so many are asked which tokens they may attend to.
ASKED = 64

#: which token of a pair the head reads: its ``"first"`` or its ``"last"``
Heads = str
Numbers = npt.NDArray[np.int64]


@dataclass(eq=False)
class VarlenBatch:
    """The tokens of all pairs of a batch, end to end; behind them there may be tokens that mean nothing.

    Attributes:
        ids, types, positions: of each token, shape (tokens,); ``types`` is ``None`` where the network takes none.
        bounds: where each pair begins, and where the last one ends: int32, shape (pairs + 1,).
        longest: tokens of the longest pair, or more.
        read: the token of each pair that the head reads, shape (pairs,). ``None``: the head reads a padded batch.
        places: in a padded batch, where each token is, as a flat number.
        shape: of the padded batch: pairs, longest.
    """

    ids: torch.Tensor
    types: torch.Tensor | None
    positions: torch.Tensor
    bounds: torch.Tensor
    longest: int
    read: torch.Tensor | None = None
    places: torch.Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    @classmethod
    def of_padded(
        cls, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None, positions: torch.Tensor | None
    ) -> VarlenBatch:
        """The row of a padded batch, all of shape (pairs, longest); ``positions``: ``None`` numbers a pair's tokens."""
        real = mask.bool()
        lengths = real.sum(1)
        places = real.flatten().nonzero()[:, 0]
        if positions is None:
            positions = real.cumsum(1) - 1
        return cls(
            ids=ids.flatten()[places],
            types=None if types is None else types.flatten()[places],
            positions=positions.flatten()[places],
            bounds=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
            longest=int(lengths.max()),
            places=places,
            shape=(mask.shape[0], mask.shape[1]),
        )

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """What the head reads of hidden states of shape (1, tokens, width): (pairs, 1, width), or a padded batch."""
        if self.read is not None:
            return states[0].index_select(0, self.read)[:, None]
        assert self.places is not None
        padded = states.new_zeros(self.shape[0] * self.shape[1], states.shape[2])
        return padded.index_copy_(0, self.places, states[0]).unflatten(0, self.shape)


def varlen_here() -> VarlenBatch | None:
    """The row that this thread's network computes, if it computes one."""
    batch = batch_here()
    return batch if isinstance(batch, VarlenBatch) else None


class VarlenForward(UnpaddedForward):
    """Gives a base model's parts the `VarlenBatch` that is here, or one of a padded batch."""

    def _unpadded(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor | None, rest: dict[str, Any]) -> Any:
        given = varlen_here()
        if given is not None:
            return self._compute(given, given.ids, given.types, given.positions, rest)
        batch = VarlenBatch.of_padded(ids, mask, types, self._positions(ids))
        self.saved += ids.numel() - len(batch.ids)
        with attending_by(batch):
            return self._compute(batch, batch.ids, batch.types, batch.positions, rest)


# Attention.


@dataclass(frozen=True)
class _Window:
    """How many tokens before and behind itself a token attends to; -1: all."""

    before: int
    behind: int


def register_attention() -> None:
    """Let models of transformers find this attention, and its masks, under ``NAME``."""
    register(NAME, _attend, _find_window)


def _find_window(*args: Any, mask_function: Callable[..., Any], **rest: Any) -> _Window:
    """In place of a mask, the window that it is; ``ValueError`` if it is none."""
    row = varlen_here()
    assert row is not None
    last = row.longest - 1
    keys = torch.arange(last + 1)
    asking = torch.linspace(0, last, min(ASKED, last + 1)).long()[:, None]
    zero = torch.zeros((), dtype=torch.long)
    allowed = mask_function(zero, zero, asking, keys).expand(len(asking), len(keys))
    behind = int(allowed[0].nonzero()[-1, 0])
    before = last - int(allowed[-1].nonzero()[0, 0])
    if not torch.equal(allowed, (keys >= asking - before) & (keys <= asking + behind)):
        raise ValueError("its mask is no window")
    return _Window(-1 if before == last else before, -1 if behind == last and last else behind)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each pair: tensors of shape (1, heads, tokens, width) to one of (1, tokens, heads, width)."""
    check_call(module, attention_mask, _Window, rest, ("softcap", *UNKNOWN))
    row = varlen_here()
    assert row is not None
    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if queries.shape[1] != keys.shape[1]:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (tensor.repeat_interleave(group, dim=1) for tensor in (keys, values))
    return _within_bounds(queries, keys, values, row, attention_mask, scaling)[None], None


def _within_bounds(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    row: VarlenBatch,
    window: _Window,
    scaling: float | None,
) -> torch.Tensor:
    """Attention within the bounds of a row's pairs: tensors of shape (tokens, heads, width)."""
    bounds = row.bounds, row.bounds, row.longest, row.longest
    found: torch.Tensor
    if query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn  # since torch 2.10

        found = varlen_attn(*(query, key, value, *bounds), scale=scaling, window_size=(window.before, window.behind))
        return found
    if window.before != -1 or window.behind not in (-1, 0):
        raise ValueError("in float32, attention to a window has no operator")
    found = torch.ops.aten._efficient_attention_forward(
        *(query[None], key[None], value[None], None, *bounds, 0.0),
        custom_mask_type=0 if window.behind else 1,
        scale=scaling,
    )[0]
    return found[0]


# A network that takes such batches.


class VarlenNetwork:
    """Logits of pairs as one row: by a CUDA graph where it is given a call that can be captured.

    Args:
        call: the network. It takes, under the names that the tokenizer gives, tensors of shape (pairs, 1), which are of
            the token that the head reads; within, the row is `varlen_here`. Returns logits, shape (pairs, labels).
        forward: what `unpad` has put into its base model.
        names: under which the network takes its tensors.
        reads: which token of a pair its head reads.
        device: a CUDA device, or the CPU, where nothing is captured.
        most_tokens: of a row that is captured; a longer one is computed kernel by kernel.
    """

    def __init__(
        self,
        call: Callable[[dict[str, torch.Tensor]], torch.Tensor],
        forward: VarlenForward,
        names: Sequence[str],
        reads: Heads,
        device: torch.device,
        most_tokens: int,
    ) -> None:
        self._call = call
        self._padding_idx = forward.padding_idx
        self._names = names
        self._has_types = "token_type_ids" in names
        self._reads = reads
        self._device = device
        self._most_tokens = most_tokens if device.type == "cuda" else 0
        self._captured: LRUCache[tuple[int, int, int], _Captured] = LRUCache(GRAPHS)
        self._memory: Any = None  # what lies between two layers is in the same memory for all graphs

    def __call__(self, ids: Sequence[list[int]], types: Sequence[list[int]] | None) -> torch.Tensor:
        """Logits, on the device, of pairs with these tokens: shape (pairs, labels)."""
        lengths = np.array([len(tokens) for tokens in ids])
        total, longest = int(lengths.sum()), int(lengths.max())
        captured = total <= self._most_tokens
        size = (rounded_tokens(total), rounded_pairs(len(ids)), rounded_longest(longest))
        tokens, pairs, longest = size if captured else (total, len(ids), longest)
        parts = [
            _flat(ids, total, tokens),
            *([_flat(types or [], total, tokens)] if self._has_types else []),
            np.empty(tokens, dtype=np.int64),
            np.empty(pairs, dtype=np.int64),
            np.empty(pairs + 1, dtype=np.int64),
        ]
        self._fill(parts[0][:total], lengths, *parts[-3:])
        numbers = torch.from_numpy(np.concatenate(parts))
        if not captured:
            return self._compute(numbers.to(self._device), tokens, pairs, longest)
        graph = self._captured.get(size)
        if graph is None:
            graph = self._captured[size] = self._capture(numbers, size)
        return graph.replay(numbers)[: len(ids)]

    def _fill(self, ids: Numbers, lengths: Numbers, positions: Numbers, read: Numbers, bounds: Numbers) -> None:
        """Write positions, the tokens that are read, and bounds; pairs that fill the row up have no tokens."""
        ends = lengths.cumsum()
        starts = ends - lengths
        bounds[0], bounds[1 : len(ends) + 1], bounds[len(ends) + 1 :] = 0, ends, len(ids)
        read[: len(ends)], read[len(ends) :] = starts if self._reads == "first" else ends - 1, 0
        if self._padding_idx is None:
            positions[: len(ids)] = np.arange(len(ids)) - np.repeat(starts, lengths)
            positions[len(ids) :] = 0
        else:
            real = (ids != self._padding_idx).astype(np.int64)
            counted = real.cumsum()
            before = np.repeat(counted[starts] - real[starts], lengths)
            positions[: len(ids)] = (counted - before) * real + self._padding_idx
            positions[len(ids) :] = self._padding_idx

    def _compute(self, numbers: torch.Tensor, tokens: int, pairs: int, longest: int) -> torch.Tensor:
        """Logits of a row that is in ``numbers``, end to end: ids, types, positions, tokens that are read, bounds."""
        sizes = [tokens] * (3 if self._has_types else 2) + [pairs, pairs + 1]
        ids, *types, positions, read, bounds = numbers.split(sizes)
        row = VarlenBatch(ids, types[0] if types else None, positions, bounds.int(), longest, read)
        tensors = {"input_ids": ids[read][:, None]}
        for name in self._names:
            if name == "token_type_ids":
                tensors[name] = types[0][read][:, None]
            elif name != "input_ids":
                tensors[name] = torch.ones_like(tensors["input_ids"])
        with attending_by(row):
            return self._call(tensors)

    def _capture(self, numbers: torch.Tensor, size: tuple[int, int, int]) -> _Captured:
        static = numbers.to(self._device)
        self._compute(static, *size)  # what is set up at a first call cannot be captured
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        self._memory = self._memory or torch.cuda.graph_pool_handle()
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"),
        ):
            logits = self._compute(static, *size)
        logger.debug("a CUDA graph for %d tokens, %d pairs of up to %d", *size)
        return _Captured(graph, static, logits)


@dataclass(frozen=True)
class _Captured:
    """A graph, what it reads and what it writes."""

    graph: torch.cuda.CUDAGraph
    numbers: torch.Tensor
    logits: torch.Tensor

    def replay(self, numbers: torch.Tensor) -> torch.Tensor:
        """Logits for other numbers: a copy, for the next replay writes over them."""
        self.numbers.copy_(numbers.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.logits.clone()


def rounded_tokens(tokens: int) -> int:
    """``tokens`` rounded up to one of eight sizes between two powers of two, at least 256."""
    step = max(256, 1 << (tokens - 1).bit_length()) // 16 if tokens > 256 else 256
    return -(-tokens // step) * step


def rounded_pairs(pairs: int) -> int:
    """``pairs`` rounded up to a power of two, at least 16."""
    return max(16, 1 << (pairs - 1).bit_length())


def rounded_longest(longest: int) -> int:
    """``longest`` rounded up to a power of two, at least `SHORTEST_BOUND`."""
    return max(SHORTEST_BOUND, 1 << (longest - 1).bit_length())


def _flat(lists: Sequence[list[int]], count: int, size: int) -> Numbers:
    """The numbers of ``lists`` end to end, and zeros up to ``size``."""
    found = np.zeros(size, dtype=np.int64)
    if lists:
        found[:count] = np.fromiter(chain.from_iterable(lists), dtype=np.int64, count=count)
    return found
