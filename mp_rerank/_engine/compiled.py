"""``torch.compile``: the network as a compiled program; on a CPU, with its weights as constants.

It is compiled as the worker starts: for any number of pairs and tokens, and again for a single pair, for which the
compiler makes another program. That takes half a minute on one core, and no cache shortens it: every worker does it,
also the one that replaces a dead one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from mp_rerank._engine.parity import Pairs
from mp_rerank._pairs import CANARY

__all__ = ["compile_network"]


def compile_network(network: torch.nn.Module, device: str, predict: Callable[[Pairs], object]) -> None:
    """Compile ``network`` in place, and use it once for each program, so that nothing is left to compile.

    Args:
        network: the transformers model within a ``CrossEncoder``.
        device: where it is.
        predict: scores one batch with that ``CrossEncoder``.

    Raises:
        RuntimeError: there is no C++ compiler, or it failed.
    """
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # as in a worker process
    options = {"freezing": True} if device.startswith("cpu") else None
    network.forward = torch.compile(network.forward, dynamic=True, options=options)
    try:
        predict(CANARY)
        predict(CANARY[:1])
    except Exception as error:
        cause = f"{type(error).__name__}: {error}"
        if "InvalidCxxCompiler" in cause:
            cause = f"there is no C++ compiler: install g++, or name yours in CXX ({cause.splitlines()[0]})"
        raise RuntimeError(f"compile=True: {cause}") from error
