"""`python -m bench kernels`: the kernels for CPUs with AMX beside torch's fastest way, on one core.

Each is called for some layers in turn, as a network does: weights and outputs come from far memory, not from the core's
own cache. Both take turns, and a round is one pass over the layers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank._engine.amx.attention import ANY, Band, Segments, attend
from mp_rerank._engine.amx.library import why_not
from mp_rerank._engine.amx.linear import TiledProduct
from mp_rerank._engine.amx.rows import Norm
from mp_rerank._engine.prepack import _OneDnnProduct
from mp_rerank._workers import heap

#: a network's width, and that of its feed-forward parts
WIDTHS = {"MiniLM-L6": (384, 1536), "BERT-base": (768, 3072), "XLM-R-large": (1024, 4096)}
#: (tokens of a pair, heads, width of a head)
PAIRS = [(72, 12, 32), (72, 16, 64), (512, 12, 32), (512, 16, 64)]
LAYERS = 6

F = torch.nn.functional

Way = Callable[[int], Any]  # of a layer's number


def main(argv: Sequence[str]) -> int:
    """Measure every kernel and write."""
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a batch (default 1024)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds each takes (default 15)")
    add_output(parser)
    options = parser.parse_args(argv)
    if reason := why_not():
        print(f"python -m bench kernels: there is nothing to measure: {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(1)
    torch.manual_seed(0)
    heap.keep_memory()  # as a worker does
    report = Report.begin("kernels", "Kernels for AMX", options)
    with torch.inference_mode():
        for dtype in options.dtypes:
            for kernel, operations, ours, theirs in kernels(getattr(torch, dtype), options.tokens):
                measure(report, {"kernel": kernel, "dtype": dtype}, operations, ours, theirs, options.rounds)
        add_errors(report)
    finish(report, options.out)
    return 0


def kernels(dtype: torch.dtype, tokens: int) -> Iterator[tuple[str, int, Way, list[Way]]]:
    """What is measured: its name, the operations of one call, our way, and torch's ways."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    for name, (width, inner) in WIDTHS.items():
        input, residual = numbers(tokens, width), numbers(tokens, width)
        ups = [(numbers(inner, width) / width**0.5, numbers(inner)) for _ in range(LAYERS)]
        downs = [(numbers(width, inner) / inner**0.5, numbers(width)) for _ in range(LAYERS)]
        up, down = ([TiledProduct(*layer, "gelu") for layer in ups], [TiledProduct(*layer, "") for layer in downs])
        one, two = ([_OneDnnProduct(*layer, "gelu") for layer in ups], [_OneDnnProduct(*layer, "") for layer in downs])
        operations = 2 * tokens * width * inner
        yield (
            f"linear {width} to {inner}, GELU",
            operations,
            lambda i, up=up, input=input: up[i](input),
            [
                lambda i, one=one, input=input: one[i](input),
                lambda i, ups=ups, input=input: F.gelu(F.linear(input, *ups[i])),
            ],
        )
        yield (
            f"feed-forward part of {name}",
            2 * operations,
            lambda i, up=up, down=down, input=input, residual=residual: up[i].feed(down[i], input, residual),
            [
                lambda i, one=one, two=two, input=input, residual=residual: two[i](one[i](input), residual, "add"),
                lambda i, ups=ups, downs=downs, input=input, residual=residual: (
                    F.linear(F.gelu(F.linear(input, *ups[i])), *downs[i]) + residual
                ),
            ],
        )
        weight, bias = torch.ones(width), torch.zeros(width)
        norm, plain = Norm(weight, bias, 1e-5, centred=True), (weight.to(dtype), bias.to(dtype))
        yield (
            f"layer norm of {width}",
            0,
            lambda i, norm=norm, input=input: norm(input),
            [lambda i, plain=plain, input=input, width=width: F.layer_norm(input, (width,), *plain, 1e-5)],
        )
    for length, heads, width in PAIRS:
        count = max(1, tokens // length)
        states = [[numbers(count * length, heads, width) for _ in range(3)] for _ in range(LAYERS)]
        begins = np.arange(count) * length
        own = np.stack([begins, np.full(count, length), np.zeros(count), np.arange(count), np.ones(count)], 1)
        segments = Segments(own.astype(np.int64), np.stack([begins, np.full(count, length)], 1))
        yield (
            f"attention of {heads} heads of {width}, pairs of {length} tokens",
            4 * count * heads * length**2 * width,
            lambda i, states=states, segments=segments: attend(*states[i], segments, Band(ANY, ANY)),
            [
                lambda i, states=states, count=count: F.scaled_dot_product_attention(
                    *(part.unflatten(0, (count, -1)).transpose(1, 2) for part in states[i])
                )
            ],
        )


def measure(report: Report, of: dict[str, str], operations: int, ours: Way, theirs: list[Way], rounds: int) -> None:
    """Call both for each layer, by turns, and add their ratio."""
    times, rates = [], []
    for turn in range(rounds + 2):  # the first two warm up
        seconds, *others = (_seconds(way) for way in (ours, *theirs))
        if turn > 1:
            times.append(min(others) / seconds)
            rates.append(LAYERS * operations / seconds / 1e12)
    report.add(of, "times torch", times, better="higher")
    if operations:
        report.add(of, "TFLOP/s", rates, better="higher")


def _seconds(way: Way) -> float:
    start = time.perf_counter()
    for layer in range(LAYERS):
        way(layer)
    return time.perf_counter() - start


def add_errors(report: Report) -> None:
    """The root mean square error of a float32 product, beside float64."""
    input, weight = torch.randn(1000, 1024), torch.randn(512, 1024)
    exact = input.double() @ weight.double().T
    for name, found in (("ours", TiledProduct(weight, None, "")(input)), ("torch's", input @ weight.T)):
        error = (found.double() - exact).square().mean().sqrt()
        of = {"kernel": f"float32 product, {name}", "dtype": "float32"}
        report.add(of, "error, 1e-6", 1e6 * float(error), better="lower")
