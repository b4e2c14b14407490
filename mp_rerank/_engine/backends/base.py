"""Other runtimes for a model's network, in the worker: one module each, imported where it is asked for.

    CrossEncoder.predict:  tokenize -> network(**tensors).logits -> activation -> scores

Only the network is replaced, so that everything about a pair's text stays the library's own. It is loaded in torch,
called with a few pairs to see what the library hands it, converted as the function of those tensors that it is, proved
to give the same scores where it computes in float32, and then its torch weights are let go.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from mp_rerank._engine.calls import Pairs, record_calls
from mp_rerank._pairs import CANARY
from mp_rerank.config import ModelSpec

__all__ = ["Backend", "Inputs", "Network", "Run", "find_backend", "replace_network"]

#: the tokenizer's tensors by name, shape (pairs, tokens) each
Inputs = dict[str, torch.Tensor]
#: logits of such tensors, shape (pairs, num_labels)
Run = Callable[[Inputs], torch.Tensor]

# Largest difference of a float32 score, absolute and relative.
TOLERANCE = 1e-4
LONG = (CANARY[0][0], "long " * 600)
# Batches unlike the one that is traced: what a trace took for a constant shows in them.
PROOF = (CANARY, CANARY[:1], CANARY[1:], [*CANARY[::-1], LONG])


class Network(torch.nn.Module):
    """A network as a function of tensors in a fixed order, giving logits: what converters take."""

    def __init__(self, network: torch.nn.Module, names: Sequence[str], constants: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)
        self.constants = constants

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(**dict(zip(self.names, tensors, strict=True)), **self.constants).logits
        return logits


class Backend(Protocol):
    """What a module of this room has."""

    def prepare(self, dtype: str) -> None:
        """Import what is needed for ``dtype``, or raise ``ModuleNotFoundError``."""

    def convert(
        self,
        network: Network,
        example: Inputs,
        dtype: str,
        threads: int | None,
        record: Callable[[Sequence[Pairs]], list[Inputs]],
    ) -> Run:
        """``network`` in this runtime.

        Args:
            network: in float32 on the CPU.
            example: what it is called with, two pairs of unequal length.
            dtype: one of those ``config.DTYPES`` has for the backend.
            threads: compute threads; ``None`` leaves the runtime's default.
            record: gives what it is called with for batches of other pairs.
        """


def find_backend(spec: ModelSpec, device: str) -> Backend:
    """The module for ``spec``, with what it needs imported.

    Raises:
        ModuleNotFoundError: naming the extra to install.
        ValueError: ``device`` is no CPU.
    """
    spec.check_devices([device])
    backend: Backend = importlib.import_module(f"mp_rerank._engine.backends.{spec.backend}")
    try:
        backend.prepare(spec.dtype or "float32")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"backend={spec.backend!r} needs {error.name}: pip install 'mp-rerank[{spec.backend}]'"
        ) from error
    return backend


def replace_network(
    network: torch.nn.Module,
    backend: Backend,
    dtype: str,
    threads: int | None,
    predict: Callable[[Pairs], npt.NDArray[np.float32]],
) -> None:
    """Let ``backend`` compute what ``network`` does, and drop the network's weights.

    Args:
        network: the transformers model within a ``CrossEncoder``, in float32; its parameters keep their shapes, take
            no memory, and read as NaN.
        predict: scores one batch with that ``CrossEncoder``.

    Raises:
        ValueError: the converted network gives other scores.
        Exception: whatever converting raises.
    """
    expected = [predict(batch) for batch in PROOF]

    def record(batches: Sequence[Pairs]) -> list[Inputs]:
        return [_split(call)[0] for batch in batches for call in record_calls(network, predict, batch)]

    inputs, constants = _split(record_calls(network, predict, CANARY)[0])
    with _unheard():
        run = backend.convert(Network(network, list(inputs), constants).eval(), inputs, dtype, threads, record)

    def forward(**arguments: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=run({name: arguments[name] for name in inputs}))

    network.forward = forward
    for parameter in network.parameters():
        parameter.data = parameter.data.new_full((), math.nan).expand(parameter.shape)
    gc.collect()
    for batch, scores in zip(PROOF, expected, strict=True):
        found = predict(batch)
        if found.shape != scores.shape or not np.isfinite(found).all():
            raise ValueError(f"the converted network scores {found}, not {scores}")
        if dtype == "float32" and not np.allclose(found, scores, rtol=TOLERANCE, atol=TOLERANCE):
            raise ValueError(f"the converted network scores {found}, not {scores}, for {len(batch)} pairs")


@contextmanager
def _unheard() -> Iterator[None]:
    """What converters warn of: their own age, what a trace fixes, what else could be done. The proof shows the rest."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _split(call: dict[str, Any]) -> tuple[Inputs, dict[str, Any]]:
    """A call's tensors, and its other arguments: the same in every call."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in call.items() if name not in tensors}
    return {name: value.clone() for name, value in tensors.items()}, constants  # copies no longer in inference mode
