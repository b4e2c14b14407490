"""The model on its device: loaded whole, proved, and fed batches of the right size. The only importer of torch.

Scores are ``CrossEncoder.predict``'s own: each batch goes through it. What is decided here is which pairs go together:
sorted by length, as many as fit a budget of padded tokens, since one long document in a batch makes every pair as long.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder
from transformers.utils import logging as transformers_logging

from mp_rerank.config import ModelSpec
from mp_rerank.tokens import estimate_pair, estimate_text

__all__ = ["Engine", "prove"]

logger = logging.getLogger(__name__)


class Engine:
    """One model that never leaves its device.

    Args:
        spec: the model.
        device: such as ``"cpu"`` or ``"cuda:1"``.
        threads: compute threads to set in torch; ``None`` leaves them alone.
        batch_tokens: padded tokens of one forward pass.
        loaded: a ``CrossEncoder`` made by the spec's own loader, to be used in place of loading here.

    Raises:
        ValueError: what was loaded is not wholly on ``device``, or not of the dtype asked for.
        Exception: whatever loading raises.
    """

    def __init__(
        self, spec: ModelSpec, device: str, threads: int | None, batch_tokens: int, loaded: CrossEncoder | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
            try:
                torch.set_num_interop_threads(1)
            except RuntimeError:  # parallel work has begun (a loader's): it keeps the setting it began with
                logger.debug("interop threads were already in use")
            # A worker's logs go where its root logger's do.
            transformers_logging.disable_default_handler()
            transformers_logging.enable_propagation()
            transformers_logging.disable_progress_bar()
        self.batch_tokens = batch_tokens
        self.model = _load(spec, device) if loaded is None else loaded
        self.model.eval()
        self.dtype, self.weights_bytes = prove(self.model, torch.device(device), spec.dtype)
        self.max_length = _max_length(self.model)

    def facts(self) -> dict[str, Any]:
        """What there is to say of the loaded model, under ``WorkerFacts``' names."""
        return {"dtype": self.dtype, "weights_bytes": self.weights_bytes, "max_length": self.max_length}

    def predict(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Scores of ``pairs`` in their order: float32, shape (n,) or (n, num_labels)."""
        lengths = [estimate_pair(estimate_text(query), document, self.max_length) for query, document in pairs]
        scores: list[Any] = [None] * len(pairs)
        for batch in batches(lengths, self.batch_tokens):
            predicted = self.model.predict(
                [pairs[i] for i in batch], batch_size=len(batch), show_progress_bar=False, convert_to_numpy=True
            )
            for i, value in zip(batch, predicted, strict=True):
                scores[i] = value
        return np.asarray(scores, dtype=np.float32)


def batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of ``lengths``, longest first, in batches of at most ``budget`` once padded to their longest, or one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        yield order[start : start + size]
        start += size


def prove(model: torch.nn.Module, device: torch.device, dtype: str | None) -> tuple[str, int]:
    """Check that ``model`` is wholly materialized on ``device``, and of ``dtype`` where one was asked for.

    Returns:
        The dtype of its floating-point weights (joined by ``+`` where there are several) and its size in bytes.

    Raises:
        ValueError: naming the first tensor that is on meta, elsewhere, or of another dtype.
    """
    exempt = _kept_in_float32(model)
    dtypes: dict[str, int] = {}
    size = 0
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has a shape and no data")
        if tensor.device.type != device.type or (device.index is not None and tensor.device.index != device.index):
            raise ValueError(f"{name} is on {tensor.device}, not on {device}")
        size += tensor.nbytes
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            if dtype not in (None, "auto") and kind != dtype and not any(part in name for part in exempt):
                raise ValueError(f"{name} is {kind}, not the {dtype} that was asked for")
            dtypes[kind] = dtypes.get(kind, 0) + tensor.numel()
    return "+".join(sorted(dtypes, key=lambda kind: -dtypes[kind])), size


def _kept_in_float32(model: torch.nn.Module) -> set[str]:
    """Parts of parameter names that the architecture itself keeps in float32 whatever dtype is asked for."""
    kept: set[str] = set()
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept.update(getattr(module, attribute, None) or ())
    return kept


def _load(spec: ModelSpec, device: str) -> CrossEncoder:
    model_kwargs = dict(spec.model_kwargs)
    if spec.dtype is not None:
        model_kwargs["dtype"] = spec.dtype if spec.dtype == "auto" else getattr(torch, spec.dtype)
    accepted = inspect.signature(CrossEncoder.__init__).parameters
    processor = "processor_kwargs" if "processor_kwargs" in accepted else "tokenizer_kwargs"
    return CrossEncoder(
        spec.path,
        device=device,
        revision=spec.revision,
        max_length=spec.max_length,
        activation_fn=None if spec.activation is None else _activation(spec.activation),
        trust_remote_code=spec.trust_remote_code,
        model_kwargs=model_kwargs,
        config_kwargs=dict(spec.config_kwargs),
        **{processor: dict(spec.tokenizer_kwargs)},
    )


def _activation(path: str) -> Any:
    module, _, name = path.rpartition(".")
    found = getattr(__import__(module, fromlist=[name]), name)
    return found() if isinstance(found, type) else found


def _max_length(model: Any) -> int | None:
    """Tokens a pair is truncated to; ``None`` where the tokenizer's limit is the "no limit" of transformers."""
    for name in ("max_seq_length", "max_length"):  # 6.x, and before
        value = getattr(model, name, None)
        if isinstance(value, int):
            return value if value < 1_000_000 else None
    return None
