"""Other runtimes for a model's network: what a backend's module provides, and how a network is replaced by it.

    CrossEncoder.predict:  tokenize -> network(**tensors) -> logits, or states for further modules -> scores

Only the network is replaced: what is done to texts, and to what the network gives, stays the library's own.

1. The model is loaded in torch, in float32, and scores a few batches. What the library calls the network with is
   recorded.
2. The backend converts the network, as a function of those tensors.
3. The network's torch weights are freed.
4. The batches are scored again. In float32, scores must be the same within tolerance, or loading fails.
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
import torch
from transformers.modeling_outputs import BaseModelOutput, SequenceClassifierOutput

from mp_rerank._engine.parity import Pairs, Scores, record_calls
from mp_rerank._pairs import CANARY, tolerance
from mp_rerank.config import ModelSpec

__all__ = ["Backend", "Inputs", "Network", "Run", "find_backend", "replace_network"]

#: the tokenizer's tensors by name, shape (pairs, tokens) each
Inputs = dict[str, torch.Tensor]
#: logits of such tensors, shape (pairs, num_labels); of a network without a head hidden states, (pairs, tokens, width)
Run = Callable[[Inputs], torch.Tensor]

LONG = (CANARY[0][0], "long " * 600)
# Batches unlike the one that is traced: they show what a trace has wrongly taken for a constant.
PROOF = (CANARY, CANARY[:1], CANARY[1:], [*CANARY[::-1], LONG])


class Network(torch.nn.Module):
    """A network as a function of tensors in a fixed order, giving logits or hidden states: what converters take."""

    def __init__(self, network: torch.nn.Module, names: Sequence[str], constants: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.names = tuple(names)
        self.constants = constants

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        output = self.network(**dict(zip(self.names, tensors, strict=True)), **self.constants)
        found: torch.Tensor = output[_result_name(output)]
        return found


class Backend(Protocol):
    """What a backend's module provides."""

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


def find_backend(spec: ModelSpec, device: str) -> Backend | None:
    """The module for the backend of ``spec``, with what it needs imported; ``None`` for torch.

    Raises:
        ModuleNotFoundError: naming the extra to install.
        ValueError: ``device`` is no CPU.
    """
    if spec.backend == "torch":
        return None
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
    predict: Callable[[Pairs], Scores],
) -> None:
    """Let ``backend`` compute what ``network`` does, and free the network's weights.

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

    outputs: list[Any] = []
    plain = network.forward

    def keep_output(**arguments: Any) -> Any:
        outputs.append(plain(**arguments))
        return outputs[-1]

    inputs, constants = _split(record_calls(network, predict, CANARY, keep_output)[0])
    with _no_warnings():
        run = backend.convert(Network(network, list(inputs), constants).eval(), inputs, dtype, threads, record)

    [name] = {_result_name(output) for output in outputs}

    def forward(**arguments: Any) -> SequenceClassifierOutput | BaseModelOutput:
        found = run({name: arguments[name] for name in inputs})
        return SequenceClassifierOutput(logits=found) if name == "logits" else BaseModelOutput(last_hidden_state=found)

    network.forward = forward
    _free_weights(network)
    for batch, scores in zip(PROOF, expected, strict=True):
        _check_scores(predict(batch), scores, dtype)


def _result_name(output: Any) -> str:
    """What is read of a network's output: its logits, or, where it has no head, its last hidden states."""
    return "logits" if "logits" in output else "last_hidden_state"


def _check_scores(found: Scores, expected: Scores, dtype: str) -> None:
    """Raise ``ValueError`` unless they are the same; fewer bits than float32's need only give finite scores."""
    alike = found.shape == expected.shape and bool(np.isfinite(found).all())
    if dtype == "float32":
        limit = tolerance("another runtime", dtype)
        alike = alike and np.allclose(found, expected, rtol=limit, atol=limit)
    if not alike:
        raise ValueError(f"the converted network scores {found}, not {expected}, for {len(expected)} pairs")


def _free_weights(network: torch.nn.Module) -> None:
    for parameter in network.parameters():
        parameter.data = parameter.data.new_full((), math.nan).expand(parameter.shape)
    gc.collect()


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Within, nobody hears what converters warn of: deprecations, constants in a trace. The scores are checked."""
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
