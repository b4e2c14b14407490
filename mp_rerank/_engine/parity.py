"""Parity: keep an optimization only if scores stay within tolerance; otherwise undo it.

``keep_if_equal`` does that. ``record_calls`` is what other proofs need: it shows what ``CrossEncoder.predict`` calls
the network with.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mp_rerank._pairs import Pair, tolerance

__all__ = ["Pairs", "Scores", "keep_if_equal", "record_calls"]

logger = logging.getLogger(__name__)

Pairs = Sequence[Pair]
Scores = npt.NDArray[np.float32]


def keep_if_equal(
    what: str,
    change: Callable[[], object],
    undo: Callable[[], object],
    predict: Callable[[], Scores] | None,
    dtype: str,
) -> str:
    """Do ``change``; ``undo`` it if scores then differ by more than the tolerance, or if anything is raised.

    Args:
        what: the change, for the log.
        predict: scores some fixed pairs with the model; ``None``: scores are known to stay the same.
        dtype: of the model's weights.

    Returns:
        Why the change is not kept; empty: it is.
    """
    limit = tolerance("optimized", dtype)
    try:
        if predict is None:
            change()
            return ""
        before = predict()
        change()
        after = predict()
        if np.allclose(before, after, rtol=limit, atol=limit):
            return ""
        logger.debug("%s: undone, for scores become %s instead of %s", what, after, before)
        why_not = "scores would differ"
    except Exception as error:  # an operator that this build of torch lacks, or a module that is built otherwise
        logger.debug("%s: not possible here", what, exc_info=True)
        why_not = str(error).partition("\n")[0] or type(error).__name__
    undo()
    return why_not


def record_calls(
    network: torch.nn.Module, predict: Callable[[Pairs], Any], batch: Pairs, answer: Callable[..., Any] | None = None
) -> list[dict[str, Any]]:
    """The arguments of each call of ``network`` while ``predict(batch)`` runs.

    Args:
        network: the transformers model within a ``CrossEncoder``; or, since sentence-transformers 6, the
            ``CrossEncoder`` itself, whose one argument is a dict: that dict's entries are then recorded.
        predict: scores one batch with that ``CrossEncoder``.
        answer: is called in the network's place, with the same arguments; ``None`` calls the network.
    """
    calls: list[dict[str, Any]] = []
    present = network.forward
    replaced = "forward" in vars(network)

    def forward(*features: Any, **arguments: Any) -> Any:
        calls.append(dict(*features, **arguments))  # a copy: modules add to what they are given
        return (answer or present)(*features, **arguments)

    network.forward = forward
    try:
        predict(batch)
    finally:
        if replaced:
            network.forward = present
        else:
            del network.forward
    return calls
