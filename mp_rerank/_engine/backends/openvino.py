"""OpenVINO: float32, bfloat16, or int8 calibrated on a few texts.

OpenVINO reads the network from torch's trace of it. For int8, NNCF fixes the ranges of activations by those that a few
pairs of English texts give: without calibration OpenVINO quantizes weights alone, which was no faster. The rest of an
int8 network is in bfloat16 where the CPU has that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from mp_rerank._engine.backends.base import Inputs, Network, Run
    from mp_rerank._engine.parity import Pairs

__all__ = ["convert", "prepare"]

TELEMETRY = "openvino_telemetry"


def prepare(dtype: str) -> None:
    """Import OpenVINO, and NNCF for int8, without the package by which both report their use to their makers."""
    with _without(TELEMETRY):
        import openvino
        import openvino.tools.ovc  # noqa: F401

        if dtype == "int8":
            import nncf  # noqa: F401


def convert(
    network: Network,
    example: Inputs,
    dtype: str,
    threads: int | None,
    record: Callable[[Sequence[Pairs]], list[Inputs]],
) -> Run:
    """See ``Backend``."""
    import openvino

    with torch.no_grad():
        model = openvino.convert_model(network, example_input=tuple(example.values()))
    if dtype == "int8":
        model = _quantize(model, record)
    core = openvino.Core()
    bfloat16 = dtype == "bfloat16" or (
        dtype == "int8" and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    )
    properties: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # every worker would pin its threads to the same cores
    }
    if threads is not None:
        properties["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(model, "CPU", properties)

    def run(inputs: Inputs) -> torch.Tensor:
        return torch.from_numpy(compiled([tensor.numpy() for tensor in inputs.values()])[0])

    return run


def _quantize(model: Any, record: Callable[[Sequence[Pairs]], list[Inputs]]) -> Any:
    import nncf

    from mp_rerank._engine.backends.calibration import PAIRS

    inputs = [[tensor.numpy() for tensor in call.values()] for call in record([[pair] for pair in PAIRS])]
    return nncf.quantize(model, nncf.Dataset(inputs), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(inputs))


@contextmanager
def _without(module: str) -> Iterator[None]:
    """Within, importing ``module`` fails, unless it is there already."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]
