"""Where a model's files are on this disk: to know their size, and whether they have changed.

Reads the hub's cache by its documented layout, since what loads models takes seconds to import.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from mp_rerank.config import ModelSpec
from mp_rerank.errors import ModelLoadError

__all__ = ["check_backend", "check_hub_cache", "folder_of", "weight_files", "will_be_mapped"]

# Floating-point types by their names in safetensors.
STORED_AS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def folder_of(spec: ModelSpec) -> Path | None:
    """The model's local folder, or its snapshot in the hub's cache.

    ``None``: it is in neither, or a loader knows.
    """
    if spec.loader is not None:
        return None
    if spec.local:
        return Path(spec.path) if os.path.isdir(spec.path) else None
    repository = _hub_cache() / f"models--{spec.name.replace('/', '--')}"
    revision = spec.revision or "main"
    try:
        revision = (repository / "refs" / revision).read_text().strip()
    except (OSError, ValueError):  # a commit, or nothing that was ever fetched
        pass
    snapshot = repository / "snapshots" / revision
    return snapshot if os.path.isdir(snapshot) else None


def weight_files(spec: ModelSpec) -> list[Path]:
    """The files of the model's weights, in the format that has more bytes; none if they are not on this disk."""
    folder = folder_of(spec)
    if folder is None:
        return []
    formats = [  # a cache holds links, whose files may be gone
        [file for file in sorted(folder.glob(pattern)) if file.is_file()]
        for pattern in ("*.safetensors", "pytorch_model*.bin")
    ]
    return max(formats, key=lambda files: sum(file.stat().st_size for file in files))


def will_be_mapped(spec: ModelSpec, files: Sequence[Path]) -> bool:
    """Whether workers on the CPU are expected to share these weights: mapped, in the dtype that the file has."""
    if spec.backend != "torch" or spec.weights != "shared":
        return False
    if not files or any(file.suffix != ".safetensors" for file in files):
        return False
    try:
        stored = {dtype for file in files for dtype in _dtypes(file) if dtype.startswith(("F", "BF"))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # no checkpoint: loading it will say so
        return False
    return len(stored) == 1 if spec.dtype == "auto" else stored == {STORED_AS[spec.dtype or "float32"]}


def _dtypes(file: Path) -> set[str]:
    """The dtypes in a safetensors file, from its header: JSON behind its length, in 8 bytes."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is no safetensors file")
        header = json.loads(opened.read(length))
    return {tensor["dtype"] for name, tensor in header.items() if name != "__metadata__"}


def check_backend(spec: ModelSpec) -> None:
    """Raise ``ValueError`` where the backend of ``spec`` is known not to take the model, as its config names it."""
    folder = folder_of(spec)
    if spec.backend != "openvino" or folder is None:
        return
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # none, or no JSON: the worker says what is wrong with it
        return
    architectures = config.get("architectures") if isinstance(config, dict) else None
    for name in architectures or ():
        if str(name).endswith("ForCausalLM"):  # padded on the left: the first places attend to nothing
            raise ValueError(
                f"backend='openvino' computes NaN for {name}, whose pairs are padded on the left: "
                "take backend='onnx' or 'torch'"
            )


def check_hub_cache(spec: ModelSpec) -> None:
    """Raise ``ModelLoadError`` where there is no place for a hub's models: no home folder, and no variable instead."""
    if not spec.local and str(_hub_cache()).startswith("~"):
        cause = (
            "there is no home folder to keep a hub's models in: set HF_HOME to a folder that this process may write to"
        )
        raise ModelLoadError(f"{spec.name} could not be loaded: {cause}", model=spec.name, cause=cause)


def _hub_cache() -> Path:
    """Where huggingface_hub keeps what it fetches, by the environment variables that it documents."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(cache))  # Path.expanduser raises where there is no home folder
