"""ONNX Runtime: float32, or int8 with activations quantized as they come (no calibration).

torch traces the network into an ONNX file, in about a second. sentence-transformers' own ``backend="onnx"`` needs
optimum, which holds transformers back at version 4.

int8 is for the products of matrices alone; embeddings and the head stay in float32. Each output channel of a weight
gets a scale of its own, which costs nothing and ranks better than one scale for all.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mp_rerank._engine.backends.base import Inputs, Network, Run
    from mp_rerank._engine.parity import Pairs

__all__ = ["convert", "prepare"]

OPSET = 17  # the newest that the tracing exporter writes with no further package
RESULT = "result"


def prepare(dtype: str) -> None:
    """Import ONNX Runtime, and ONNX, whose files it reads."""
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401


def convert(
    network: Network,
    example: Inputs,
    dtype: str,
    threads: int | None,
    record: Callable[[Sequence[Pairs]], list[Inputs]],
) -> Run:
    """See ``Backend``."""
    from onnxruntime import InferenceSession, SessionOptions

    options = SessionOptions()
    options.inter_op_num_threads = 1
    if threads is not None:
        options.intra_op_num_threads = threads
        # Threads that wait for work by spinning would do so on the cores of the other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory(prefix="mp_rerank-") as folder:
        file = Path(folder) / "network.onnx"
        _export(network, example, file)
        if dtype == "int8":
            file = _quantize(file)
        session = InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]  # without those that the network does not read

    def run(inputs: Inputs) -> torch.Tensor:
        [result] = session.run([RESULT], {name: inputs[name].numpy() for name in names})
        return torch.from_numpy(result)

    return run


def _export(network: Network, example: Inputs, file: Path) -> None:
    names = list(example)
    with torch.no_grad():
        torch.onnx.export(
            network,
            tuple(example.values()),
            str(file),
            dynamo=False,  # the newer exporter takes six times as long
            input_names=names,
            output_names=[RESULT],
            dynamic_axes={name: {0: "pairs", 1: "tokens"} for name in names} | {RESULT: {0: "pairs", 1: "tokens"}},
            opset_version=OPSET,
        )


def _quantize(file: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = file.with_name("int8.onnx")
    quantize_dynamic(file, quantized, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
    return quantized
