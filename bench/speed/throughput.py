"""`python -m bench throughput`: pairs a second for many agents, of the pool and of other ways to rerank, in one run.

Eleven contenders at once would need more than 24 GiB. So they are loaded in teams of a few, and the locked model and
the pool are in every team. The contenders of a team take turns, round after round, so that other load on the machine
slows all of them alike. Models have a known shape and random weights, since speed does not depend on their values.
Every contender's scores are compared with the locked model's. The report is written after each work-load, so that
earlier results remain if a later work-load fails.

The share of the arithmetic says how much of the cores' possible rate the pool reaches. The possible rate is measured:
all cores at once multiply matrices of the model's shapes in the fastest way that torch has here. The first share
counts the linear layers' operations; the second counts those of attention too, which grow with the square of a pair's
tokens.

Work-loads are named SHAPE/AGENTS/TEXTS. Each agent has one request pending at a time. A round has so many requests that
its beginning and end, when some cores have nothing to compute, hardly count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from bench.inputs.datasets import scifact
from bench.inputs.models import SHAPES, Pairs, make_model, make_requests
from bench.reports.files import add_output, finish, save
from bench.reports.report import Report
from bench.speed.contenders import BASELINE, CONTENDERS, OURS, NotRun, Run, Setting

SCIFACT = "scifact"
#: mean words a document (SciFact's: about); a word is about one token, and a query has 8 words
TEXTS = {"short": 20, "medium": 60, "long": 300, SCIFACT: 220}
MAX_LENGTH = 512  # the models' number of positions: longer pairs are cut
#: documents a request; fewer for the larger model, since all contenders together take half an hour as it is
DOCUMENTS = {"minilm-l6": 15, "bert-base": 4}
#: tokens a round, about: with short texts each agent has many requests, with long ones one
TOKENS = {"minilm-l6": 24_000, "bert-base": 8_000}
#: contenders in memory at once, beside the baseline and the pool
TEAM = 4
WORKLOADS = [
    *("minilm-l6/8/short", "minilm-l6/8/medium", "minilm-l6/8/long", "minilm-l6/8/scifact", "minilm-l6/32/short"),
    *("bert-base/8/short", "bert-base/8/long", "bert-base/8/scifact", "bert-base/32/short"),
]


def main(argv: Sequence[str]) -> int:
    """Run the comparison and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m bench throughput", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workloads", nargs="+", default=WORKLOADS, metavar="SHAPE/AGENTS/TEXTS", type=workload)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, metavar="NAME", help="default: all that fit the device"
    )
    parser.add_argument("--device", default="cpu", help="where models are; a GPU's report is throughput-DEVICE")
    parser.add_argument("--rounds", type=int, default=3, help="rounds each contender takes (default 3)")
    parser.add_argument("--documents", type=int, help=f"documents a request (default {DOCUMENTS})")
    parser.add_argument("--tokens", type=int, help=f"tokens a round, about (default {TOKENS})")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="worker processes (default: one a CPU)")
    parser.add_argument("--data", type=Path, help="the folder with scifact/; without it, no real texts")
    add_output(parser)
    options = parser.parse_args(argv)
    on_cpu = options.device == "cpu"
    if options.contenders is None:
        options.contenders = [name for name in CONTENDERS if not (on_cpu and name == "mp_rerank-float16")]
    if "lock" not in options.contenders:
        options.contenders.insert(0, "lock")  # scores and rates are compared with it
    kind = options.device.partition(":")[0]
    report = (
        Report.begin("throughput", "Throughput", options)
        if on_cpu
        else Report.begin(
            f"throughput-{kind}", f"Throughput on a GPU ({torch.get_device_module(kind).get_device_name()})", options
        )
    )
    for shape in SHAPES:
        names = [name for name in options.workloads if name.startswith(f"{shape}/")]
        if options.data is None and any(name.endswith(SCIFACT) for name in names):
            report.note(f"{shape}: SciFact's texts not run: no --data")
            names = [name for name in names if not name.endswith(SCIFACT)]
        if names:
            measure(report, shape, names, options)
    finish(report, options.out)
    return 0


def workload(name: str) -> str:
    """``name``, if it is a work-load's."""
    shape, _, rest = name.partition("/")
    agents, _, texts = rest.partition("/")
    if shape not in SHAPES or not agents.isdecimal() or texts not in TEXTS:
        raise argparse.ArgumentTypeError(
            f"{name}: SHAPE/AGENTS/TEXTS is needed, with a shape of {', '.join(SHAPES)} and texts of {', '.join(TEXTS)}"
        )
    return name


def measure(report: Report, shape: str, names: list[str], options: argparse.Namespace) -> None:
    """Measure every work-load of one shape."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder, SHAPES[shape])
        counted = options.device == "cpu" and "mp_rerank" in options.contenders
        best = products(shape, options.workers) if counted else None
        for name in names:
            setting = Setting(folder, options.workers, int(name.split("/")[1]), options.device)
            requests = requests_of(name, options.documents, options.tokens, options.data)
            compare(report, name, setting, requests, options)
            if best is not None:
                arithmetic(report, folder, name, requests, best)
            save(report, options.out)


def teams(contenders: Sequence[str]) -> Iterator[list[str]]:
    """Teams of a few contenders, each with the locked model and the pool."""
    always = [key for key in contenders if key in ("lock", "mp_rerank")]
    others = [key for key in contenders if key not in always]
    for first in range(0, max(1, len(others)), TEAM):
        yield [*always, *others[first : first + TEAM]]


@contextmanager
def loaded(report: Report, name: str, team: Sequence[str], setting: Setting) -> Iterator[dict[str, Run]]:
    """Start the contenders of a team that can run here; their runs, by their names in tables."""
    with ExitStack() as stack:
        runs: dict[str, Run] = {}
        for key in team:
            title, contender = CONTENDERS[key]
            try:
                runs[title] = stack.enter_context(contender(setting))
            except NotRun as reason:
                report.note(f"{name}, {title}: not run: {reason}")
        print(f"{name}: {', '.join(runs)}", flush=True)
        yield runs


def requests_of(name: str, documents: int | None, tokens: int | None, data: Path | None) -> list[Pairs]:
    """The requests of a round, equally many for each agent: random words, or SciFact's claims with abstracts."""
    shape, agents, texts = name.split("/")
    if documents is None:
        documents = DOCUMENTS[shape]
    words = TEXTS[texts] + 8
    count = int(agents) * max(1, round((tokens or TOKENS[shape]) / (int(agents) * documents * words)))
    if texts != SCIFACT:
        return make_requests(count, documents, TEXTS[texts])
    assert data is not None
    collection = scifact(data, "test")
    chance = random.Random(0)
    abstracts = sorted(collection.documents.values())
    return [
        [(claim, abstract) for abstract in chance.sample(abstracts, documents)]
        for claim in chance.sample(sorted(collection.queries.values()), count)
    ]


def compare(report: Report, name: str, setting: Setting, requests: list[Pairs], options: argparse.Namespace) -> None:
    """Measure each contender's rates, and how far its scores are from the locked model's."""
    pairs = sum(len(request) for request in requests)
    rates: dict[str, list[float]] = {}
    times: dict[str, list[float]] = {}
    scores: dict[str, np.ndarray] = {}
    for team in teams(options.contenders):
        with loaded(report, name, team, setting) as runs:
            for turn in range(options.rounds + 1):  # the first is a warm-up
                rate = {}
                for title, run in runs.items():
                    start = time.perf_counter()
                    scores[title] = np.concatenate(run(requests))
                    rate[title] = pairs / (time.perf_counter() - start)
                for title in runs if turn else ():
                    rates.setdefault(title, []).append(rate[title])
                    times.setdefault(title, []).append(rate[title] / rate[BASELINE])
    for title in (CONTENDERS[key][0] for key in options.contenders if CONTENDERS[key][0] in rates):
        of = {"work": name, "contender": title}
        report.add(of, "pairs/s", rates[title], better="higher")
        report.add(of, "times the lock", times[title], better="higher")
        report.add(of, "largest score difference", float(np.abs(scores[title] - scores[BASELINE]).max()), better="")
    print(f"{name}: {pairs} pairs a round: done", flush=True)


def products(shape: str, workers: int) -> float:
    """The operations a second of all cores together when they multiply matrices of the shape."""
    hidden, inner = SHAPES[shape]["hidden_size"], SHAPES[shape]["intermediate_size"]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as executor:
        return sum(executor.map(multiply, [hidden] * workers, [inner] * workers))


def arithmetic(report: Report, folder: str, name: str, requests: list[Pairs], best: float) -> None:
    """Add the share of the best rate of matrix products that the pool reaches in float32."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    queries, documents = zip(*(pair for request in requests for pair in request), strict=True)
    encoded = tokenizer(list(queries), list(documents), truncation=True, max_length=MAX_LENGTH)["input_ids"]
    lengths = np.array([len(row) for row in encoded])
    tokens = float(lengths.mean())
    shape = SHAPES[name.partition("/")[0]]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    operations = 2 * layers * (4 * hidden * hidden + 2 * hidden * inner)  # of a token
    pairs = report.value("pairs/s", work=name, contender=OURS)
    ours = pairs * tokens * operations
    attention = pairs * 4 * layers * hidden * float((lengths**2).mean())
    of = {"arithmetic": name}
    report.add(of, "tokens a pair", tokens, better="")
    report.add(of, "GFLOP/s of bare matrix products", best / 1e9, better="")
    report.add(of, "GFLOP/s of mp_rerank, float32", ours / 1e9, better="higher")
    report.add(of, "share, %", 100 * ours / best, better="higher")
    report.add(of, "share with attention's, %", 100 * (ours + attention) / best, better="higher")


def multiply(hidden: int, inner: int, seconds: float = 6.0) -> float:
    """The operations a second of one core on the model's shapes, prepacked: the best of many short trials."""
    torch.set_num_threads(1)
    shapes = [(hidden, hidden)] * 4 + [(hidden, inner), (inner, hidden)]
    with torch.inference_mode():
        layers = [torch.nn.Linear(*size) for size in shapes]
        weights = [torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 1024) for layer in layers]
        inputs = [torch.randn(1024, size[0]) for size in shapes]
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            for layer, weight, rows in zip(layers, weights, inputs, strict=True):
                torch.ops.mkldnn._linear_pointwise(rows, weight, layer.bias, "none", [], "")
            best = min(best, time.perf_counter() - start)
    return sum(2 * 1024 * rows * columns for rows, columns in shapes) / best
