"""A batch without padding: one row of tokens, and attention within each pair of it.

    padded batch  ->  PackedBatch: the tokens of all pairs, end to end  ->  layers  ->  padded batch, for the head

Linear layers, norms and activations see each token by itself. Only attention has to know which tokens belong together
(``attention``).

A pair is one *segment* of the row. In a model whose tokens attend to earlier ones only, pairs that begin alike (with
the same system prompt, instruction and query) need their common beginning once. It is then a segment of its own, the
*parent* of those that follow it, and those may share a beginning in their turn:

    S system prompt, Q1, Q2 queries, A to D documents:    S  ->  Q1  ->  A, B
                                                             ->  Q2  ->  C, D

A segment's tokens attend to those of its parents and to its own, as far as the model's own mask allows that.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._engine.amx.attention import Segments

__all__ = [
    "LENGTH_MULTIPLE",
    "TOKEN_MULTIPLE",
    "LengthBucket",
    "PackedBatch",
    "attending_by",
    "batch_here",
    "common_beginning",
    "current_batch",
]

#: A row has a multiple of so many tokens. oneDNN makes a kernel for every number of tokens and keeps it, and memory of
#: ever new sizes is fragmented: with a model of 18 MB a worker grew by 760 MB in 600 batches, and now by 100.
TOKEN_MULTIPLE = 32
#: In attention, a segment is padded to a multiple of this. Of a vector register that is not full, each number is
#: computed by itself, which takes twice as long for 31 or 63 tokens as for 32 or 64.
LENGTH_MULTIPLE = 16

Numbers = npt.NDArray[np.int64]


# Segments.


@dataclass(eq=False)
class Segment:
    """Tokens that follow one another in the row.

    Attributes:
        pair: a pair that they are of.
        begin, end: where in that pair they are.
        parent: what they follow; ``None``: they are a pair's first.
        start: where in the row they are; known once the row is laid out.
    """

    pair: int
    begin: int
    end: int
    parent: Segment | None = None
    start: int = 0

    @property
    def length(self) -> int:
        return self.end - self.begin

    def row(self) -> Numbers:
        """Where in the row its pair's tokens are, from the pair's first one to the end of this segment."""
        own = np.arange(self.start, self.start + self.length)
        return own if self.parent is None else np.concatenate([self.parent.row(), own])


def whole_pairs(lengths: Numbers) -> list[Segment]:
    """A segment for each pair."""
    return [Segment(pair, 0, int(length)) for pair, length in enumerate(lengths)]


def shared_beginnings(tokens: list[list[int]], shortest: int) -> tuple[list[Segment], list[Segment]]:
    """Segments of pairs that need their common beginnings once.

    Args:
        tokens: of each pair.
        shortest: a common beginning of fewer tokens is not shared: a segment costs a call of attention for itself.

    Returns:
        All segments, parents before those that follow them; and each pair's last one, in the order of the pairs.
    """
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    common = [common_beginning(tokens[a], tokens[b]) for a, b in pairwise(order)]
    segments: list[Segment] = []
    last: dict[int, Segment] = {}

    def divide(first: int, stop: int, parent: Segment | None) -> None:
        """Segments of the pairs ``order[first:stop]``, which have all that ``parent`` has in common."""
        begin = parent.end if parent else 0
        while first < stop:
            after = first + 1
            while after < stop and common[after - 1] >= begin + shortest:
                after += 1
            pair = order[first]
            if after == first + 1:
                last[pair] = Segment(pair, begin, len(tokens[pair]), parent)
                segments.append(last[pair])
            else:
                segments.append(Segment(pair, begin, min(common[first : after - 1]), parent))
                divide(first, after, segments[-1])
            first = after

    divide(0, len(order), None)
    return segments, [last[pair] for pair in range(len(tokens))]


def common_beginning(tokens: list[int], others: list[int]) -> int:
    """How many tokens two pairs begin with alike; at least one is left to each."""
    limit = min(len(tokens), len(others)) - 1
    if tokens[:limit] == others[:limit]:
        return limit
    low, high = 0, limit  # tokens[:low] are alike, tokens[:high] are not
    while high - low > 1:
        middle = (low + high) // 2
        if tokens[low:middle] == others[low:middle]:
            low = middle
        else:
            high = middle
    return low


# A packed batch.


@dataclass(frozen=True, eq=False)
class LengthBucket:
    """Segments of a packed batch that attention takes together, each padded to the same length.

    Attributes:
        before: tokens of each one's parents.
        padded_length: of each segment itself, a multiple of `LENGTH_MULTIPLE`.
        lengths: of each segment, shape (segments,).
        keys: which tokens of the row are attended to: those of the parents, and the segment's own; in padding, any.
            Shape (segments * (before + padded_length),).
        asking: which tokens of the row attend, shape (segments * padded_length,).
        span: where in the row these segments are, end to end.
        real: which of ``asking`` is no padding, in order, shape (tokens in the span,).
        ends: which of the segments are a pair's last, and their pairs: two of shape (segments that are,).
    """

    before: int
    padded_length: int
    lengths: torch.Tensor
    keys: torch.Tensor
    asking: torch.Tensor
    span: slice
    real: torch.Tensor
    ends: tuple[torch.Tensor, torch.Tensor]


class PackedBatch:
    """Where the pairs of a batch are in a row of their tokens.

    Args:
        mask: which places of the padded batch are tokens, shape (pairs, longest); those of a pair are adjoining.
        tokens: the padded batch, where common beginnings are to be shared; else ``None``.
        shortest: the shortest beginning that is shared.

    Attributes:
        sources: which place of the padded batch, as a flat number, each token of the row is from. Shape (tokens,), a
            multiple of `TOKEN_MULTIPLE`: behind the last pair there may be tokens that mean nothing.
        positions: which token of its pair each one is, shape (tokens,).
        buckets: its segments by their length.
        count: tokens that mean something.
        looks_ahead: whether some token may attend to a later one; known once attention was computed.
        all_states: hidden states of all tokens, shape (1, tokens, width), while a layer is given only ``chosen`` ones.
        chosen: for each pair the token of the row whose state alone the head reads; ``None``: all of them.
        in_tiles: whether attention may use the kernel for CPUs with AMX.
        used_tiles: whether it did.
        rotates: whether rotary positions are computed in fewer passes (``fused``).
        rotations: the id of a cosine -> that cosine, and what states are multiplied with.
        buffers: memory that one layer leaves to the next (``whole_layers``).
    """

    def __init__(self, mask: torch.Tensor, tokens: torch.Tensor | None = None, shortest: int = 0) -> None:
        real = mask.numpy().astype(bool)
        self._shape = real.shape
        lengths = real.sum(1)
        firsts = real.argmax(1)
        if tokens is None:
            segments = self._last = whole_pairs(lengths)
        else:
            cut = tokens.tolist()
            segments, self._last = shared_beginnings(
                [row[first : first + n] for row, first, n in zip(cut, firsts.tolist(), lengths.tolist(), strict=True)],
                shortest,
            )
        grouped: dict[tuple[int, int], list[Segment]] = defaultdict(list)
        for segment in segments:
            grouped[segment.begin, -(-segment.length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE].append(segment)
        start = 0
        for bucket in grouped.values():
            for segment in bucket:
                segment.start = start
                start += segment.length
        self.count = start
        laid_out = [segment for bucket in grouped.values() for segment in bucket]
        sizes = np.array([segment.length for segment in laid_out])
        begins = np.array([segment.begin for segment in laid_out])
        offsets = np.array([segment.pair * self._shape[1] + firsts[segment.pair] for segment in laid_out])
        positions = np.arange(start) + np.repeat(begins - (sizes.cumsum() - sizes), sizes)
        filling = (0, -start % TOKEN_MULTIPLE)
        self.sources = torch.from_numpy(np.pad(positions + np.repeat(offsets, sizes), filling))
        self.positions = torch.from_numpy(np.pad(positions, filling))
        self.buckets = [self._bucket(before, length, bucket) for (before, length), bucket in grouped.items()]
        self._segments = laid_out
        self._real = real
        self._lengths = lengths
        self._firsts = firsts
        self._columns: torch.Tensor
        self.looks_ahead = False
        self.all_states: torch.Tensor | None = None
        self.chosen: torch.Tensor | None = None
        self.in_tiles = False
        self.used_tiles = False
        self.rotates = False
        self.rotations: dict[int, tuple[torch.Tensor, tuple[torch.Tensor, ...]]] = {}
        self.buffers: dict[object, Any] = {}

    def _bucket(self, before: int, padded_length: int, segments: list[Segment]) -> LengthBucket:
        lengths = np.array([segment.length for segment in segments])
        starts = np.array([segment.start for segment in segments])[:, None]
        numbers = np.arange(padded_length)
        real = numbers < lengths[:, None]
        asking = keys = np.where(real, starts + numbers, starts)
        if before:
            parents: dict[int, Numbers] = {}
            for segment in segments:
                assert segment.parent is not None
                if id(segment.parent) not in parents:
                    parents[id(segment.parent)] = segment.parent.row()
            keys = np.concatenate([np.stack([parents[id(segment.parent)] for segment in segments]), asking], axis=1)
        ends = [
            (number, segment.pair) for number, segment in enumerate(segments) if self._last[segment.pair] is segment
        ]
        which, pairs = np.array(ends, dtype=np.int64).reshape(-1, 2).T
        return LengthBucket(
            before=before,
            padded_length=padded_length,
            lengths=torch.from_numpy(lengths),
            keys=torch.from_numpy(keys.ravel()),
            asking=torch.from_numpy(asking.ravel()),
            span=slice(int(starts[0, 0]), int(starts[-1, 0] + lengths[-1])),
            real=torch.from_numpy(real.ravel().nonzero()[0]),
            ends=(torch.from_numpy(which.copy()), torch.from_numpy(pairs.copy())),
        )

    @cached_property
    def _spans(self) -> tuple[Numbers, dict[int, tuple[int, int]]]:
        """Where in the row keys are, as (begin, tokens); of each segment, by its id, its first span and how many."""
        spans: list[tuple[int, int]] = []
        which: dict[int, tuple[int, int]] = {}
        for segment in self._segments:
            chain = [(segment.start, segment.length)]
            parent = segment.parent
            while parent is not None:
                chain.append((parent.start, parent.length))
                parent = parent.parent
            which[id(segment)] = len(spans), len(chain)
            spans += chain[::-1]
        return np.array(spans), which

    @cached_property
    def segments(self) -> Segments:
        """What attends to what, where all tokens do."""
        spans, which = self._spans
        return Segments(
            np.array([(one.start, one.length, one.begin, *which[id(one)]) for one in self._segments]), spans
        )

    @cached_property
    def segments_of_chosen(self) -> Segments:
        """The same where each pair's ``chosen`` token does, and queries are of all tokens."""
        assert self.chosen is not None
        spans, which = self._spans
        # A pair may have no token: in its place `chosen` names another pair's.
        columns = [self.chosen.numpy(), (self._lengths > 0).astype(np.int64), self.positions[self.chosen].numpy()]
        ends = np.array([which[id(one)] for one in self._last])
        return Segments(np.column_stack([*np.broadcast_arrays(*columns), ends]), spans)

    @cached_property
    def segments_of_pairs(self) -> Segments:
        """The same where queries are of the ``chosen`` tokens alone."""
        whole = self.segments_of_chosen
        segments = whole.segments.copy()
        segments[:, 0] = np.arange(len(segments))
        return Segments(segments, whole.spans)

    @cached_property
    def empty(self) -> list[int]:
        """The pairs that have no token."""
        return [int(pair) for pair in np.flatnonzero(self._lengths == 0)]

    @property
    def saved(self) -> int:
        """Tokens that are not computed: padding, and copies of common beginnings."""
        return int(self._real.size) - self.count

    @property
    def shared(self) -> int:
        """Tokens that are not computed since pairs have them in common."""
        return int(self._lengths.sum()) - self.count

    def choose(self, which: str) -> torch.Tensor:
        """Let the head read one token a pair: its ``"first"`` or its ``"last"``. Where in the row they are."""
        numbers = np.zeros_like(self._lengths) if which == "first" else self._lengths - 1
        if which == "first":
            rows = [segment.row()[0] if segment.parent else segment.start for segment in self._last]
        else:
            rows = [segment.start + segment.length - 1 for segment in self._last]
        self._columns = torch.from_numpy(self._firsts + numbers)
        self.chosen = torch.tensor(rows)
        return self.chosen

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """Hidden states of the row, or of the ``chosen`` tokens, as of a padded batch: zeros in what is not there.

        Args:
            states: shape (1, tokens, width).

        Returns:
            Shape (pairs, longest, width).
        """
        row = states[0]
        padded = row.new_zeros(*self._shape, row.shape[1])
        if self.chosen is None:
            where = torch.from_numpy(np.concatenate([segment.row() for segment in self._last]))
            padded[torch.from_numpy(self._real)] = row.index_select(0, where)
        else:
            padded[torch.arange(len(padded)), self._columns] = row
        return padded


class Unpacks(Protocol):
    """A batch without padding."""

    def unpack(self, states: torch.Tensor) -> torch.Tensor:
        """The padded batch that the head reads, of hidden states of shape (1, tokens, width)."""


_here = threading.local()  # .batch: the packed batch that this thread's network computes


def current_batch() -> PackedBatch:
    """The packed batch that this thread's network computes; ``AttributeError`` where it computes none."""
    batch: PackedBatch = _here.batch
    return batch


def batch_here() -> Unpacks | None:
    """The batch without padding that this thread's network computes, if it computes one."""
    return getattr(_here, "batch", None)


@contextmanager
def attending_by(batch: Unpacks) -> Iterator[None]:
    """Within, attention on this thread goes by ``batch``: a `PackedBatch`, or on a GPU a row (``varlen``)."""
    _here.batch = batch
    try:
        yield
    finally:
        del _here.batch
