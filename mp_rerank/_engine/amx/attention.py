"""Attention within each pair of a row of tokens, by the library's kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._engine.amx.library import DTYPES, find_library, is_wide, why_not

__all__ = ["ANY", "Band", "Segments", "attend", "takes", "why_not_here"]

#: of a `Band`: however far
ANY = 1 << 30
_Strides = ctypes.c_long * 8


@dataclass(frozen=True)
class Band:
    """Which tokens a token attends to: so many ``before`` it, so many ``after`` it, and itself."""

    before: int
    after: int


class Segments:
    """What attends to what: the arguments of one packed batch's calls, the same in all its layers.

    Args:
        segments: of each one its first query, and how many there are; the first one's position among its keys; its
            first span, and how many there are. Shape (segments, 5).
        spans: of each one its first key, and how many there are. A segment's keys are those of its spans, in their
            order. Shape (spans, 2).
    """

    def __init__(self, segments: npt.NDArray[np.int64], spans: npt.NDArray[np.int64]) -> None:
        self.segments = np.ascontiguousarray(segments, dtype=np.int64)
        self.spans = np.ascontiguousarray(spans, dtype=np.int64)
        self.arguments = self.segments.ctypes.data, len(segments), self.spans.ctypes.data


def why_not_here(dtype: torch.dtype) -> str:
    """Why attention with numbers of this dtype is not computed by the kernel; empty: it is."""
    return why_not() or ("" if dtype in DTYPES else f"there is no kernel for {str(dtype).removeprefix('torch.')}")


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel computes attention of these; see `attend`."""
    alike = query.dtype == key.dtype == value.dtype and key.shape == value.shape and query.shape[2] == key.shape[2]
    return alike and not why_not_here(query.dtype)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    band: Band,
    scale: float | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each segment's queries find among its keys.

    Args:
        query, key, value: of one dtype, float32 or bfloat16, shape (tokens, heads, width). Keys and values may have
            fewer heads, of which each is then for some heads of queries that follow one another.
        scale: products of queries and keys are multiplied with it; ``None``: 1 / the root of the width.
        into: where that is written to, of the queries' shape and dtype; not where any of them is. ``None``: new memory.

    Returns:
        Shape (tokens, heads, width). Where no segment has a query, it is whatever was in memory.
    """
    library = find_library()
    assert library is not None
    query, key, value = (states if states.stride(2) == 1 else states.contiguous() for states in (query, key, value))
    output = torch.empty(query.shape, dtype=query.dtype) if into is None else into
    if output.shape != query.shape or output.dtype is not query.dtype or output.stride(2) != 1:
        raise ValueError(f"what queries of {tuple(query.shape)} find, into {tuple(output.shape)} of {output.dtype}")
    strides = _Strides(
        *(distance for states in (query, key, value, output) for distance in (states.stride(0), states.stride(1)))
    )
    _, heads, width = query.shape
    library.mp_attention(
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        output.data_ptr(),
        strides,
        *segments.arguments,
        heads,
        key.shape[1],
        width,
        width**-0.5 if scale is None else scale,
        band.before,
        band.after,
        is_wide(query),
        torch.get_num_threads(),
    )
    return output
