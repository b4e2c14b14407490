"""`python -m bench reuse`: agents that ask alike: without reuse, with equal pending pairs scored once, and with a
score cache too.

Each agent asks one question after another. Questions come from a small set and are asked unequally often (Zipf's law).
The documents of a question differ a little from agent to agent: 100 of the 125 nearest to it. Each round has new
questions, so that the cache has nothing of use when a round begins. All settings get the same rounds, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank import RerankerPool
from mp_rerank.config import BUILTIN, BUILTIN_FOLDER

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {"coalesce": False},
    "pending pairs": {},
    "and a score cache": {"score_cache": 100_000},
}
#: the pool's counters, as shares of all pairs
COUNTERS = {"scored_pairs": "scored, %", "coalesced_pairs": "with a pending one, %", "cached_pairs": "kept, %"}
DIFFERENCE = "largest score difference"
# The documents near a question, as a multiple of those that one request has.
NEAREST = 1.25

Question = tuple[str, list[str]]


def main(argv: Sequence[str]) -> int:
    """Measure and write; 1 if a setting changes a score."""
    parser = argparse.ArgumentParser(prog="python -m bench reuse", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default=BUILTIN, help="built in, of the hub, or a folder")
    parser.add_argument("--agents", type=int, default=8, help="agent threads")
    parser.add_argument("--requests", type=int, default=3, help="questions each of them asks in a round")
    parser.add_argument("--queries", type=int, default=10, help="different questions in a round")
    parser.add_argument("--exponent", type=float, default=1.0, help="of Zipf's law; 0: all equally often")
    parser.add_argument("--documents", type=int, default=100, help="documents of a request")
    parser.add_argument("--words", type=int, default=60, help="words of a document, about")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of each pool")
    parser.add_argument("--rounds", type=int, default=3, help="after one to warm up")
    add_output(parser)
    options = parser.parse_args(argv)
    report = Report.begin("reuse", "Agents that ask alike", options)
    measure(report, options)
    finish(report, options.out)
    return int(any(row.measure == DIFFERENCE and row.median > 1e-5 for row in report.rows))


def measure(report: Report, options: argparse.Namespace) -> None:
    """Measure all rounds with each setting."""
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    shares: dict[str, dict[str, list[float]]] = {name: {counter: [] for counter in COUNTERS} for name in SETTINGS}
    differences = dict.fromkeys(SETTINGS, 0.0)
    pairs = options.agents * options.requests * options.documents
    with ExitStack() as stack:
        agents = stack.enter_context(ThreadPoolExecutor(options.agents))
        pools = {
            name: stack.enter_context(RerankerPool(options.model, devices="cpu", workers=options.workers, **setting))
            for name, setting in SETTINGS.items()
        }
        for turn in range(options.rounds + 1):
            asked = make_round(options, turn)
            expected: list[list[float]] = []
            for name, pool in pools.items():
                before = pool.stats()
                start = time.perf_counter()
                scores = list(agents.map(lambda questions, pool=pool: play(pool, questions), asked))
                seconds = time.perf_counter() - start
                after = pool.stats()
                expected = expected or scores
                differences[name] = max(differences[name], np.abs(np.subtract(scores, expected)).max().item())
                if turn:
                    rates[name].append(pairs / seconds)
                    for counter, found in shares[name].items():
                        found.append(100 * (getattr(after, counter) - getattr(before, counter)) / pairs)
    nothing = rates[next(iter(SETTINGS))]
    for name in SETTINGS:
        of = {"reused": name}
        report.add(of, "pairs/s", rates[name], better="higher")
        gains = [ours / theirs for ours, theirs in zip(rates[name], nothing, strict=True)]
        report.add(of, "times the first", gains, better="higher")
        for counter, measured in COUNTERS.items():
            report.add(of, measured, shares[name][counter], better="")
        report.add(of, DIFFERENCE, differences[name])


def make_round(options: argparse.Namespace, turn: int) -> list[list[Question]]:
    """The questions of each agent in round ``turn``, each with its documents."""
    chance = random.Random(turn)
    vocabulary = json.loads((BUILTIN_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isalpha() and len(word) > 2)

    def text(length: float) -> str:
        return " ".join(chance.choices(words, k=max(3, int(length))))

    near = int(options.documents * NEAREST)
    questions = [
        (text(8), [text(chance.gauss(options.words, options.words / 3)) for _ in range(near)])
        for _ in range(options.queries)
    ]
    weights = [(rank + 1) ** -options.exponent for rank in range(options.queries)]
    return [
        [
            (query, chance.sample(nearest, options.documents))
            for query, nearest in chance.choices(questions, weights, k=options.requests)
        ]
        for _ in range(options.agents)
    ]


def play(pool: RerankerPool, questions: list[Question]) -> list[float]:
    """Ask the questions one after another; all scores, in the order of the documents."""
    scores = []
    for query, documents in questions:
        scores += pool.predict([(query, document) for document in documents]).tolist()
    return scores
