"""What a network is called with while a ``CrossEncoder`` scores: the seam between the two, watched at work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["record_calls"]

Pairs = Sequence[tuple[str, str]]


def record_calls(
    network: torch.nn.Module, predict: Callable[[Pairs], Any], batch: Pairs, answer: Callable[..., Any] | None = None
) -> list[dict[str, Any]]:
    """The arguments of each call of ``network`` while ``predict(batch)`` runs.

    Args:
        network: the transformers model within a ``CrossEncoder``.
        predict: scores one batch with that ``CrossEncoder``.
        answer: answers in the network's place, with the same arguments; ``None`` lets the network answer.
    """
    calls: list[dict[str, Any]] = []
    present = network.forward
    replaced = "forward" in vars(network)

    def forward(**arguments: Any) -> Any:
        calls.append(arguments)
        return (answer or present)(**arguments)

    network.forward = forward
    try:
        predict(batch)
    finally:
        if replaced:
            network.forward = present
        else:
            del network.forward
    return calls
