"""`python -m bench prefix`: what a decoder gains from computing once what pairs begin with alike, by lengths.

One request of some documents, whose pairs all begin with the same tokens (as system prompt, instruction and query are),
is scored in one process, by turns: by the engine, by the engine without common beginnings, and by
`CrossEncoder.predict`. The network has the shape of Qwen3-0.6B's layers, fewer of them, and random weights.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from sentence_transformers import CrossEncoder

from bench.inputs.architectures import make_decoder
from bench.inputs.models import Pairs
from bench.reports.files import add_output, finish, save
from bench.reports.report import Report
from mp_rerank import ModelSpec
from mp_rerank._engine.engine import Engine

PREFIXES = (0, 32, 64, 128, 256, 512)
DOCUMENTS = (16, 64, 128, 256, 512)


def main(argv: Sequence[str]) -> int:
    """Measure each pair of lengths and write."""
    parser = argparse.ArgumentParser(prog="python -m bench prefix", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--prefixes", nargs="+", type=int, default=list(PREFIXES), help="tokens in common")
    parser.add_argument("--lengths", nargs="+", type=int, default=list(DOCUMENTS), help="tokens of a document")
    parser.add_argument("--documents", type=int, default=8, help="documents a request (default 8)")
    parser.add_argument("--layers", type=int, default=4, help="layers of the network (default 4; Qwen3-0.6B has 28)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds each takes (default 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compute threads (default: one a CPU)")
    add_output(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report = Report.begin("prefix", "Common beginnings", options)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(make_decoder(folder, options.layers))
        words = single_words(folder)
        for prefix in options.prefixes:
            for length in options.lengths:
                measure(report, ways, request(words, prefix, length, options.documents), (prefix, length), options)
                save(report, options.out)
            print(f"{prefix} tokens in common: done", file=sys.stderr, flush=True)
    finish(report, options.out)
    return 0


Way = Callable[[Pairs], np.ndarray]


def make_ways(folder: str) -> dict[str, Way]:
    """What is compared, by its name."""
    shares = Engine(ModelSpec(folder), "cpu", None, 1024).optimize()
    if not shares.recipe.shares_beginnings:
        raise RuntimeError(f"common beginnings are not shared here: {shares.recipe}")
    apart = Engine(ModelSpec(folder), "cpu", None, 1024).optimize(replace(shares.recipe, shares_beginnings=False))
    model = CrossEncoder(folder, device="cpu")
    return {
        "shared": shares.predict,
        "not shared": apart.predict,
        "CrossEncoder.predict": lambda pairs: np.asarray(model.predict(pairs)),
    }


def single_words(folder: str) -> list[str]:
    """Words that are one token each."""
    tokenizer = CrossEncoder(folder, device="cpu").tokenizer
    return sorted(word for word in tokenizer.get_vocab() if word.isalpha() and word.isascii() and len(word) > 2)


def request(words: list[str], prefix: int, length: int, documents: int) -> Pairs:
    """Pairs of a query of ``prefix`` tokens, and documents of ``length`` tokens that begin differently."""
    chance = random.Random(prefix + length)
    query = " ".join(chance.choices(words, k=prefix))
    firsts = chance.sample(words, documents)
    return [(query, " ".join([first, *chance.choices(words, k=length - 1)])) for first in firsts]


def measure(
    report: Report, ways: dict[str, Way], pairs: Pairs, lengths: tuple[int, int], options: argparse.Namespace
) -> None:
    """Let all ways score ``pairs``, by turns, and add their times and ratios."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    scores = {}
    for turn in range(options.rounds + 1):  # the first is a warm-up, of two pairs
        for name, way in ways.items():
            start = time.perf_counter()
            scores[name] = way(pairs if turn else pairs[:2])
            if turn:
                seconds[name].append(time.perf_counter() - start)
    of = {"tokens in common": lengths[0], "tokens of a document": lengths[1]}
    shared = seconds["shared"]
    for name in ("CrossEncoder.predict", "not shared"):
        times = [theirs / ours for theirs, ours in zip(seconds[name], shared, strict=True)]
        report.add(of, f"times {name}", times, better="higher")
    report.add(of, "pairs/s", [len(pairs) / taken for taken in shared], better="higher")
    report.add(
        of,
        "largest score difference",
        float(np.abs(scores["shared"] - scores["CrossEncoder.predict"]).max()),
        better="",
    )
