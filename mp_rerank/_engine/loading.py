"""Loads a model, proves that it is whole, and knows what versions of the libraries differ in.

A load can go wrong without an error: with threads that load at the same time, with a checkpoint that lacks weights, or
in a loader of the user's. So nothing is scored before ``prove`` has looked at every tensor of the model.
"""

from __future__ import annotations

import inspect
import logging
import os
from typing import Any

import torch
import transformers
from sentence_transformers import CrossEncoder

from mp_rerank.config import ModelSpec

__all__ = [
    "draws_weights",
    "load",
    "module_of",
    "prove",
    "prove_positions",
    "prove_tokenizer",
    "torch_dtype",
    "truncation_length",
    "version_of",
    "warn_of_slow_dtype",
]

logger = logging.getLogger(__name__)

#: Pairs of texts in several scripts: a tokenizer that knows no word at all makes the same tokens of both.
UNLIKE_TEXTS = (("bread", "birds"), ("хлеб", "птица"), ("面", "鳥"), ("12", "37"))


def load(spec: ModelSpec, device: str) -> CrossEncoder:
    """The model of ``spec`` on ``device``.

    Raises:
        ValueError: the name is a hub's, and there is a folder of that name here, which the libraries would take.
        Exception: whatever the libraries raise.
    """
    if not spec.local and os.path.exists(spec.path):
        raise ValueError(
            f"{spec.name!r} was no folder when the pool was made, so it names a model of the hub; now there is a "
            f"folder of that name in {os.getcwd()}, which is not loaded in its place: give its full path if it is meant"
        )
    model_kwargs = dict(spec.model_kwargs)
    dtype = torch_dtype(spec)
    if dtype is not None:
        argument = "dtype" if version_of(transformers) >= (4, 56) else "torch_dtype"
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


def prove(module: torch.nn.Module, device: torch.device, dtype: str | None) -> tuple[str, int]:
    """Check that all of ``module`` has data, is on ``device``, and has the dtype that was asked for, if any was.

    Returns:
        The dtype of its floating-point weights (joined by ``+`` where there are several) and its size in bytes.

    Raises:
        ValueError: naming the first tensor that has no data, is on another device, or is of another dtype.
    """
    exempt = _kept_in_float32(module)
    dtypes: dict[str, int] = {}
    size = 0
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        _check_placed(name, tensor, device)
        size += tensor.nbytes
        if isinstance(tensor, torch.nn.Parameter) and tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            quantized = tensor.element_size() == 1  # a checkpoint's storage, whatever dtype it computes in
            exempted = quantized or any(part in name for part in exempt)
            if dtype not in (None, "auto") and kind != dtype and not exempted:
                raise ValueError(f"{name} is {kind}, not the {dtype} that was asked for")
            dtypes[kind] = dtypes.get(kind, 0) + tensor.numel()
    return "+".join(sorted(dtypes, key=lambda kind: -dtypes[kind])), size


def draws_weights(spec: ModelSpec, device: str) -> tuple[CrossEncoder, bool]:
    """The model of ``spec`` on ``device``, and whether some of its weights may have been drawn at random.

    transformers draws what a checkpoint lacks: a head that was never trained, or a part that nothing reads. Modules of
    sentence-transformers' own always draw theirs, before they load them; what they lack is an error.
    """
    before = torch.get_rng_state()
    model = load(spec, device)
    drawn = not torch.equal(before, torch.get_rng_state())
    parts = [type(part).__name__ for part in model.children()] if isinstance(model, torch.nn.Module) else []
    return model, drawn and "Dense" not in parts


def prove_tokenizer(model: Any) -> None:
    """Raise ``ValueError`` unless the tokenizer of ``model``, a ``CrossEncoder``, can pad and tells texts apart."""
    tokenizer = getattr(model, "tokenizer", None)
    if not callable(tokenizer):
        return
    if getattr(tokenizer, "pad_token", "") is None:
        end, number = getattr(tokenizer, "eos_token", None), getattr(tokenizer, "eos_token_id", None)
        raise ValueError(
            "its tokenizer has no padding token, which pairs of unequal length need: name one, such as "
            f"ModelSpec(..., tokenizer_kwargs={{'pad_token': {end or '<pad>'!r}}}, "
            f"config_kwargs={{'pad_token_id': {0 if number is None else number}}})"
        )
    words = (
        set(tokenizer.get_vocab()).difference(tokenizer.all_special_tokens) if hasattr(tokenizer, "get_vocab") else ()
    )
    alike = (tokenizer(one)["input_ids"] == tokenizer(other)["input_ids"] for one, other in UNLIKE_TEXTS)
    if not words and all(alike):  # one with words may know none of these
        raise ValueError(
            f"its tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} tokens) makes the same tokens of every text: "
            "are its files (tokenizer.json, or vocab.txt and the like) beside the weights?"
        )


def prove_positions(model: Any, max_length: int | None) -> None:
    """Raise ``ValueError`` if ``model``, a ``CrossEncoder``, reads more tokens of a pair than it has positions for."""
    embeddings = getattr(getattr(model.model, "base_model", None), "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    if max_length is None or not isinstance(table, torch.nn.Embedding):
        return
    # RoBERTa's and its kin's: the first token has the position after the padding's.
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    positions = table.num_embeddings - first
    if max_length > positions:
        raise ValueError(
            f"it is to read up to {max_length} tokens of a pair (max_length), and has positions for {positions}: "
            f"give ModelSpec(..., max_length={positions})"
        )


def module_of(model: Any) -> torch.nn.Module:
    """``model`` as a torch module: itself, or, before sentence-transformers 4, the network in a ``CrossEncoder``."""
    module: torch.nn.Module = model if isinstance(model, torch.nn.Module) else model.model
    return module


def truncation_length(model: Any) -> int | None:
    """How many tokens of a pair ``model`` reads; ``None`` where it has no limit, or a loader's model does not say."""
    # The newer name first, and no other where it exists: asking 6.x for the older one is deprecated.
    name = "max_seq_length" if hasattr(type(model), "max_seq_length") else "max_length"
    value = getattr(model, name, None)
    if value is None:  # before sentence-transformers 4, whoever gives none gets the tokenizer's
        value = getattr(getattr(model, "tokenizer", None), "model_max_length", None)
    # transformers writes "no limit" as a number of thirty digits.
    return value if isinstance(value, int) and value < 1_000_000 else None


def activation_name(model: Any) -> str:
    """What makes a score of what the network puts out; empty where a loader's model does not say."""
    activation = getattr(model, "activation_fn", None)
    return "" if activation is None else getattr(activation, "__name__", type(activation).__name__)


def followed_options(model: Any) -> frozenset[str]:
    """Which of the fields of ``PairOptions`` can be followed with ``model``."""
    found = set()
    if isinstance(model, CrossEncoder):
        if "prompt" in inspect.signature(model.predict).parameters:
            found.add("prompt")
        if getattr(getattr(model, "tokenizer", None), "is_fast", False):
            found.update(("max_tokens_per_doc", "truncation", "long_documents"))
    return frozenset(found)


def prompts_of(model: Any) -> dict[str, str]:
    """The prompts of ``model``, by their names."""
    prompts = getattr(model, "prompts", None) or {}
    return {name: prompt for name, prompt in prompts.items() if isinstance(prompt, str)}


def default_prompt(model: Any) -> str | None:
    """The prompt that ``model``, of sentence-transformers 6, takes where none is given."""
    prompt: str | None = (model.prompts or {}).get(model.default_prompt_name)
    return prompt


def torch_dtype(spec: ModelSpec) -> str | None:
    """The dtype to load in: other backends convert from float32."""
    return spec.dtype if spec.backend == "torch" else "float32"


def warn_of_slow_dtype(dtype: str) -> None:
    """Log a warning where this CPU has no instructions for ``dtype``: torch then computes in plain loops.

    The built-in model on an AMD EPYC with AVX2 and no more: 181 pairs a second in float32, 24 in either of 16 bits.
    """
    kind = dtype.partition("+")[0]
    if torch.backends.mkldnn.is_available() and (
        (kind == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported())
        or (kind == "float16" and not torch.ops.mkldnn._is_mkldnn_fp16_supported())
    ):
        logger.warning(
            "this CPU has no instructions for %s: dtype='float32' is several times as fast here "
            "[mp-rerank explain slow-dtype]",
            kind,
        )


def _check_placed(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device: it has a shape and no data")
    if tensor.device.type != device.type or (tensor.device.index or 0) != (device.index or 0):
        raise ValueError(f"{name} is on {tensor.device}, not on {device}")


def _kept_in_float32(module: torch.nn.Module) -> set[str]:
    """Parts of parameter names that the architecture itself keeps in float32 whatever dtype is asked for."""
    kept: set[str] = set()
    for part in module.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            kept.update(getattr(part, attribute, None) or ())
    return kept


def _activation(path: str) -> Any:
    module, _, name = path.rpartition(".")
    found = getattr(__import__(module, fromlist=[name]), name)
    return found() if isinstance(found, type) else found


def version_of(package: Any) -> tuple[int, int]:
    """Major and minor version of ``package``."""
    major, minor = package.__version__.split(".")[:2]
    return int(major), int(minor)
