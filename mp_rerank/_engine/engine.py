"""The model on its device: loaded whole, proved, and fed batches of the right size. The only importer of torch.

Scores are ``CrossEncoder.predict``'s own: each batch goes through it, or directly through its parts where that is
proved to be the same. What is decided here is which pairs go together: sorted by length, as many as fit a budget of
tokens, padded ones unless the network leaves padding out.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from sentence_transformers import CrossEncoder
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from mp_rerank._engine.calls import record_calls
from mp_rerank._engine.pipeline import Direct, find_direct
from mp_rerank._engine.prepack import prepack
from mp_rerank._engine.readout import read_first
from mp_rerank._engine.unpad import unpad
from mp_rerank._engine.weights import make_private, mapped_bytes
from mp_rerank._pairs import CANARY, estimate_pair, estimate_text
from mp_rerank.config import ModelSpec

__all__ = ["Engine", "prove"]

logger = logging.getLogger(__name__)


class Engine:
    """One model that never leaves its device.

    Args:
        spec: the model.
        device: such as ``"cpu"`` or ``"cuda:1"``.
        threads: compute threads to set in torch; ``None`` leaves them alone.
        batch_tokens: padded tokens of one forward pass.
        loaded: a ``CrossEncoder``, or another module with ``predict(pairs)``, made by the spec's own loader, to be used
            in place of loading here.
        owns_process: whether this process does nothing else: its libraries' settings may then be changed, and a model
            that a loader made.

    Raises:
        ValueError: what was loaded is not wholly on ``device``, or not of the dtype asked for.
        Exception: whatever loading raises.

    Attributes:
        prepacked: linear layers that are prepacked.
        unpadded: whether the network computes on no padding.
        first_only: whether its last layer computes what the head reads and no more.
        tokens: of the pairs last scored, after truncation; ``None`` where only ``predict`` knows.
    """

    def __init__(
        self,
        spec: ModelSpec,
        device: str,
        threads: int | None,
        batch_tokens: int,
        loaded: Any = None,
        *,
        owns_process: bool = False,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
            try:
                torch.set_num_interop_threads(1)
            except RuntimeError:  # parallel work has begun (a loader's): it keeps the setting it began with
                logger.debug("interop threads were already in use")
        if owns_process:
            # A worker's logs go where its root logger's do.
            transformers_logging.disable_default_handler()
            transformers_logging.enable_propagation()
            transformers_logging.disable_progress_bar()
            # tqdm's own lock is a semaphore shared by processes; of a worker that is killed, the interpreter's resource
            # tracker would call it leaked, in the user's terminal.
            tqdm.set_lock(threading.RLock())
            # Of the attentions torch may choose for 16 bits on a GPU, cuDNN's plans anew for every shape of a batch; no
            # two batches here have one. MiniLM-L6 in float16 on an H200: 3,441 pairs a second with it, 10,199 without.
            torch.backends.cuda.enable_cudnn_sdp(False)
            # Weights that a checkpoint lacks are drawn at random: differently in each worker, so that the canary tells.
            torch.seed()
        self.batch_tokens = batch_tokens
        backend = None
        if spec.backend != "torch":  # before the model is loaded: it may be missing
            from mp_rerank._engine.backends.base import find_backend

            backend = find_backend(spec, device)
        self.model = _load(spec, device) if loaded is None else loaded
        if not callable(getattr(self.model, "predict", None)):
            raise TypeError(f"the loader returned {type(loaded).__name__}, which has no predict(pairs)")
        network = _network(self.model)
        network.eval()
        self.dtype, self.weights_bytes = prove(network, torch.device(device), _torch_dtype(spec))
        self.max_length = _max_length(self.model)
        self.prepacked = 0
        self.unpadded = self.first_only = False
        self.tokens: int | None = None
        self._direct: Direct | None = None
        ours = loaded is None or owns_process  # else a loader's, in a process where others may be using it
        if backend is None and device.startswith("cpu"):
            _warn_of_slow_arithmetic(self.dtype)
        if backend is not None:
            from mp_rerank._engine.backends.base import replace_network

            self.dtype = spec.dtype or "float32"
            replace_network(self.model.model, backend, self.dtype, threads, self._predict)
        elif ours:
            if spec.weights == "private":
                make_private(network)
            if spec.compile:
                from mp_rerank._engine.compiled import compile_network

                compile_network(self.model.model, device, self._predict)
            else:
                if spec.unpad and device.startswith("cpu") and isinstance(self.model, CrossEncoder):
                    self.unpadded = unpad(self.model.model, self.dtype, self.canary)
                    self.first_only = self.unpadded and read_first(self.model.model, self.dtype, self.canary)
                if spec.prepack:
                    self.prepacked = prepack(network, self.dtype, self.canary)
        if ours:
            self._direct = find_direct(self.model, self._predict, self.max_length)
        self.mapped_bytes = mapped_bytes(network)

    def facts(self) -> dict[str, Any]:
        """What there is to say of the loaded model, under ``WorkerFacts``' names."""
        return {
            "dtype": self.dtype,
            "weights_bytes": self.weights_bytes,
            "mapped_bytes": self.mapped_bytes,
            "max_length": self.max_length,
        }

    def predict(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        """Scores of ``pairs`` in their order: float32, shape (n,) or (n, num_labels)."""
        scores: list[Any] = [None] * len(pairs)
        for batch, values in self._batches(pairs) if pairs else ():
            for i, value in zip(batch, values, strict=True):
                scores[i] = value
        return np.asarray(scores, dtype=np.float32)

    def canary(self) -> np.ndarray:
        """What no change for speed may change: the canary's scores, and the logits that an activation makes them of.

        A sigmoid is flat where it is near 0 or 1, and would hide that another logit comes out.
        """
        if not isinstance(self.model, CrossEncoder):
            return np.asarray(self._predict(CANARY))
        network = self.model.model
        present = network.forward
        found: list[Any] = []

        def answer(**arguments: Any) -> Any:
            output = present(**arguments)
            logits = output.logits
            if logits.ndim == 2:  # else a generating model's, of every token
                found.append(logits.float().cpu().numpy().ravel())
            return output

        record_calls(network, lambda pairs: found.append(np.ravel(self._predict(pairs))), CANARY, answer)
        return np.concatenate(found)

    def _batches(self, pairs: list[tuple[str, str]]) -> Iterator[tuple[list[int], Any]]:
        """Indices of ``pairs``, batch by batch, with their scores."""
        if self._direct is None:
            lengths = [estimate_pair(estimate_text(query), document, self.max_length) for query, document in pairs]
            for batch in padded_batches(lengths, self.batch_tokens):
                yield batch, self._predict([pairs[i] for i in batch])
        else:
            tokenized = self._direct.tokenize(pairs)
            self.tokens = sum(tokenized.lengths)
            cut = even_batches if self.unpadded else padded_batches
            for batch in cut(tokenized.lengths, self.batch_tokens):
                yield batch, self._direct.score(tokenized, batch)

    def _predict(self, batch: Sequence[tuple[str, str]]) -> Any:
        if isinstance(self.model, CrossEncoder):
            # As a tensor: sentence-transformers 3.0 makes no array of bfloat16.
            scores = self.model.predict(
                list(batch), batch_size=len(batch), show_progress_bar=False, convert_to_tensor=True
            )
            return scores.float().cpu().numpy()
        return self.model.predict(list(batch))


def padded_batches(lengths: list[int], budget: int) -> Iterator[list[int]]:
    """Indices of ``lengths``, longest first, in batches of at most ``budget`` once padded to their longest, or one."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        size = max(1, budget // lengths[order[start]])
        yield order[start : start + size]
        start += size


def even_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of ``lengths``, longest first, in batches of about equal sums, as near to ``budget`` as can be."""
    total = sum(lengths)
    count = max(1, round(total / budget))
    found: list[list[int]] = [[] for _ in range(count)]
    before = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        found[int((before + lengths[i] / 2) / total * count)].append(i)
        before += lengths[i]
    return [batch for batch in found if batch]


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
        if tensor.device.type != device.type or (tensor.device.index or 0) != (device.index or 0):
            raise ValueError(f"{name} is on {tensor.device}, not on {device}")
        size += tensor.nbytes
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            quantized = tensor.element_size() == 1  # a checkpoint's storage, whatever dtype it computes in
            exempted = quantized or any(part in name for part in exempt)
            if dtype not in (None, "auto") and kind != dtype and not exempted:
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
    dtype = _torch_dtype(spec)
    if dtype is not None:
        argument = "dtype" if _version(transformers) >= (4, 56) else "torch_dtype"
        model_kwargs[argument] = dtype if dtype == "auto" else getattr(torch, dtype)
    arguments: dict[tuple[str, ...], Any] = {  # under their names in sentence-transformers, the newest first
        ("model_kwargs", "automodel_args"): model_kwargs,
        ("processor_kwargs", "tokenizer_kwargs", "tokenizer_args"): dict(spec.tokenizer_kwargs),
        ("config_kwargs", "config_args"): dict(spec.config_kwargs),
        ("activation_fn", "default_activation_function"): spec.activation and _activation(spec.activation),
    }
    accepted = inspect.signature(CrossEncoder.__init__).parameters
    model = CrossEncoder(
        spec.path,
        device=device,
        revision=spec.revision,
        max_length=spec.max_length,
        trust_remote_code=spec.trust_remote_code,
        **{
            next((name for name in names if name in accepted), names[0]): value
            for names, value in arguments.items()
            if value
        },
    )
    if not isinstance(model, torch.nn.Module):  # before sentence-transformers 4, where the first predict would move it
        model.model.to(device)
    return model


def _warn_of_slow_arithmetic(dtype: str) -> None:
    """Say so where the CPU has no instructions for most of a model's weights, and torch takes plain loops instead.

    The built-in model on an AMD EPYC with AVX2 and no more: 181 pairs a second in float32, 24 in either of 16 bits.
    """
    kind = dtype.partition("+")[0]
    if torch.backends.mkldnn.is_available() and (
        (kind == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (kind == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    ):
        logger.warning("this CPU has no instructions for %s: dtype='float32' is several times as fast here", kind)


def _torch_dtype(spec: ModelSpec) -> str | None:
    """The dtype to load in: other backends convert from float32."""
    return spec.dtype if spec.backend == "torch" else "float32"


def _network(model: Any) -> torch.nn.Module:
    """The torch module of a ``CrossEncoder``, which is one itself since sentence-transformers 4."""
    network: torch.nn.Module = model if isinstance(model, torch.nn.Module) else model.model
    return network


def _version(package: Any) -> tuple[int, int]:
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)


def _activation(path: str) -> Any:
    module, _, name = path.rpartition(".")
    found = getattr(__import__(module, fromlist=[name]), name)
    return found() if isinstance(found, type) else found


def _max_length(model: Any) -> int | None:
    """Tokens a pair is truncated to; ``None`` where the tokenizer's limit is the "no limit" of transformers."""
    # The newer name first, and no other where it exists: asking 6.x for the older one is deprecated.
    name = "max_seq_length" if hasattr(type(model), "max_seq_length") else "max_length"
    value = getattr(model, name, None)
    if value is None:  # before sentence-transformers 4, whoever gives none gets the tokenizer's
        value = getattr(getattr(model, "tokenizer", None), "model_max_length", None)
    return value if isinstance(value, int) and value < 1_000_000 else None
