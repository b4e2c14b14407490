"""`python -m bench reuse`: agents that ask alike, with nothing reused, with equal pending pairs coalesced, and with a
score cache.

Each agent asks one question after the other, drawn from a few that are asked unequally often (Zipf's law), and gets
its candidates from an index that does not give everybody quite the same: 100 of the 125 documents nearest to it.
Every round has questions of its own, so that a cache begins each round with nothing of use. The same rounds are played
with each setting, in turns.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np

from mp_rerank import RerankerPool
from mp_rerank.config import BUILTIN, BUILTIN_FOLDER

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {"coalesce": False},
    "pending pairs": {},
    "and a score cache": {"score_cache": 100_000},
}
# How many documents are near a question, by how many of them an agent gets.
NEAREST = 1.25

Question = tuple[str, list[str]]


def main(argv: Sequence[str]) -> int:
    """Measure and print; fails if a setting changes a score."""
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
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    report = measure(options)
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)
    return 1 if any(row["largest_score_difference"] > 1e-5 for row in report["settings"]) else 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Play all rounds with each setting, and count."""
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    counts = {name: dict.fromkeys(("scored_pairs", "coalesced_pairs", "cached_pairs"), 0) for name in SETTINGS}
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
                    for counter in counts[name]:
                        counts[name][counter] += getattr(after, counter) - getattr(before, counter)
    first = next(iter(SETTINGS))
    return {
        "pairs_a_round": pairs,
        **{name: value for name, value in vars(options).items() if name != "json"},
        "settings": [
            {
                "reused": name,
                "pairs_per_second": statistics.median(rates[name]),
                "slowest": min(rates[name]),
                "fastest": max(rates[name]),
                "gain": statistics.median(a / b for a, b in zip(rates[name], rates[first], strict=True)),
                **{f"{counter}_share": count / (pairs * options.rounds) for counter, count in counts[name].items()},
                "largest_score_difference": differences[name],
            }
            for name in SETTINGS
        ],
    }


def make_round(options: argparse.Namespace, turn: int) -> list[list[Question]]:
    """For each agent the questions it asks in round ``turn``, with its candidates."""
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
    """Ask them one after the other; all scores, in the order of the documents."""
    scores = []
    for query, documents in questions:
        scores += pool.predict([(query, document) for document in documents]).tolist()
    return scores


def print_table(report: dict[str, Any]) -> None:
    """The report as Markdown."""
    print("| reused | pairs/s, median (range) | gain | scored | with a pending one | kept | score difference |")
    print("|---|---|---|---|---|---|---|")
    for row in report["settings"]:
        print(
            f"| {row['reused']} | {row['pairs_per_second']:,.0f} ({row['slowest']:,.0f} to {row['fastest']:,.0f}) "
            f"| {row['gain']:.2f} | {row['scored_pairs_share']:.0%} | {row['coalesced_pairs_share']:.0%} "
            f"| {row['cached_pairs_share']:.0%} | {row['largest_score_difference']:.0e} |"
        )
    print(
        f"\n{report['agents']} agents, {report['requests']} requests each of {report['documents']} documents a round, "
        f"of {report['queries']} questions (Zipf, exponent {report['exponent']:g}); {report['rounds']} rounds"
    )
