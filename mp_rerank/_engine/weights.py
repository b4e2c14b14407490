"""Whether a worker's weights are pages of the checkpoint's file, which all workers share, or its own copies.

Measured with transformers 4.57 and 5.23: a safetensors file (or a pickle of the newer kind, a zip) that is loaded on a
CPU in its own dtype is mapped, not read. The weights of all workers are then the same pages of the system's cache, in
memory once. A worker that writes into a weight gets a copy of that page for itself (the mapping is copy-on-write), and
changes neither the file nor the other workers' weights. Weights that are converted, or moved to a GPU, are copies
anyway.

Scores agree to the last bit or two, and not always to the bit: a BLAS library may sum in another order where a weight
begins at another fraction of a cache line.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

__all__ = ["make_private", "mapped_bytes"]

MAPS = Path("/proc/self/maps")


def mapped_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers that are pages of a file. 0 also where the system does not say; Linux does."""
    return sum(tensor.nbytes for tensor in _within(model, _mapped_files() or []))


def make_private(model: torch.nn.Module) -> None:
    """Copy the weights that are mapped. The file may then be overwritten in place, or its disk be taken away."""
    ranges = _mapped_files()
    if ranges is None:
        ranges = [(0, sys.maxsize)]
    for tensor in list(_within(model, ranges)):
        tensor.data = tensor.data.clone()


def _within(model: torch.nn.Module, ranges: Sequence[tuple[int, int]]) -> Iterator[torch.Tensor]:
    """The parameters and buffers that begin in one of the ``ranges`` of memory, each once."""
    starts = [start for start, _ in ranges]
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.layout is torch.strided and tensor.numel():
            number = bisect_right(starts, tensor.data_ptr()) - 1
            if number >= 0 and tensor.data_ptr() < ranges[number][1]:
                yield tensor


def _mapped_files() -> list[tuple[int, int]] | None:
    """Where in this process's memory files are mapped: start and end, in order. ``None``: the system does not say."""
    try:
        lines = MAPS.read_text().splitlines()
    except OSError:  # not on this system
        return None
    ranges = []
    for line in lines:
        addresses, _, _, _, inode, *_ = line.split()
        if inode != "0":
            start, _, end = addresses.partition("-")
            ranges.append((int(start, 16), int(end, 16)))
    return ranges
