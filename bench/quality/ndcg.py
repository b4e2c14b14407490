"""nDCG@10 of rerankers on BM25's 100 best documents, beside a random order, BM25 and a bi-encoder.

    python -m bench quality --data DIR [--model NAME_OR_PATH ...] [--json FILE]

The built-in model was not trained or developed on the default sets (SciFact's test claims, Vaswani, CISI). The sets
that it was developed on can be named with `--set`. All rerankers order the same 100 documents of a query: the table
says how well they order, and nothing about finding documents.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ir_measures
import numpy as np
from ir_measures import nDCG

from bench.inputs.datasets import DEVELOPMENT, HELD_OUT, Collection, scifact
from bench.quality.retrieval import BM25, BiEncoder
from mp_rerank import ModelSpec, RerankerPool
from mp_rerank.config import BUILTIN_FOLDER

#: the names that `--set` accepts
SETS = {**HELD_OUT, **DEVELOPMENT}
DEPTH = 100
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

#: scores a query's candidates: (query, texts) -> one number a text
Scorer = Callable[[str, list[str]], np.ndarray]
#: query -> its candidates, best BM25 score first
Candidates = dict[str, list[tuple[str, float]]]
#: query -> candidate -> score
Run = dict[str, dict[str, float]]


def candidates(collection: Collection) -> Candidates:
    """BM25's best `DEPTH` documents of every query."""
    keys = list(collection.documents)
    found, scores = BM25(list(collection.documents.values())).top(list(collection.queries.values()), DEPTH)
    return {
        query: [(keys[i], float(score)) for i, score in zip(row, values, strict=True)]
        for query, row, values in zip(collection.queries, found, scores, strict=True)
    }


def ndcg(collection: Collection, run: Run) -> float:
    """The mean nDCG@10 over the judged queries."""
    return ir_measures.calc_aggregate([nDCG @ 10], collection.qrels, run)[nDCG @ 10]


def rerank(collection: Collection, pool: Candidates, score: Scorer) -> Run:
    """All queries' candidates, with the scores that `score` gives them."""
    run = {}
    for query, ranked in pool.items():
        keys = [key for key, _ in ranked]
        values = score(collection.queries[query], [collection.documents[key] for key in keys])
        run[query] = dict(zip(keys, map(float, values), strict=True))
    return run


def random_order(collection: Collection, pool: Candidates, seed: int, draws: int = 20) -> float:
    """nDCG@10 of candidates in random order, the mean over a few shuffles."""
    generator = np.random.default_rng(seed)
    runs = (rerank(collection, pool, lambda _, texts: generator.random(len(texts))) for _ in range(draws))
    return float(np.mean([ndcg(collection, run) for run in runs]))


def quantiles(collection: Collection, run: Run) -> dict[str, list[float]]:
    """Quantiles of a reranker's scores, of the relevant candidates and of the others: they show a threshold."""
    scores = {True: [], False: []}
    for query, values in run.items():
        for key, value in values.items():
            scores[collection.qrels[query].get(key, 0) > 0].append(value)
    return {
        name: np.quantile(scores[flag], QUANTILES).round(4).tolist()
        for name, flag in (("relevant", True), ("others", False))
    }


def seen_and_unseen(collection: Collection, training: Collection, runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """nDCG@10 of the queries that share a relevant document with a training query, and of the others.

    SciFact's splits share their abstracts, and its claims are often variants of each other.
    """
    used = {doc for grades in training.qrels.values() for doc, grade in grades.items() if grade > 0}
    seen = {query for query, grades in collection.qrels.items() if used & {doc for doc in grades if grades[doc] > 0}}
    groups = {"seen": seen, "unseen": collection.qrels.keys() - seen}
    return {
        ranker: {
            f"{name} ({len(group)})": float(
                np.mean(
                    [m.value for m in ir_measures.iter_calc([nDCG @ 10], collection.qrels, run) if m.query_id in group]
                )
            )
            for name, group in groups.items()
        }
        for ranker, run in runs.items()
    }


def bi_encoder(collection: Collection, pool: Candidates) -> Scorer:
    """Cosines of query and candidate; a candidate of several queries is encoded once."""
    encoder = BiEncoder()
    texts = sorted({collection.documents[key] for ranked in pool.values() for key, _ in ranked})
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    return lambda query, batch: np.stack([vectors[text] for text in batch]) @ encoder.encode([query])[0]


def cross_encoder(model: str, dtype: str, collection: Collection, found: Candidates) -> tuple[Run, float]:
    """A cross-encoder's run, scored by a pool (with `CrossEncoder.predict`'s scores), and the seconds it took."""
    with RerankerPool(ModelSpec(model, dtype=dtype), devices="cpu") as pool:
        start = time.perf_counter()
        futures = {
            query: pool.submit(collection.queries[query], [collection.documents[key] for key, _ in ranked])
            for query, ranked in found.items()
        }
        run = {
            query: {found[query][result.index][0]: float(result.relevance_score) for result in future.result()}
            for query, future in futures.items()
        }
        return run, time.perf_counter() - start


@dataclass
class Measured:
    """What one run of the command found."""

    #: ranker -> set -> nDCG@10
    ndcg: dict[str, dict[str, float]] = field(default_factory=dict)
    #: cross-encoder -> set -> relevant and others -> quantiles
    scores: dict[str, dict[str, dict[str, list[float]]]] = field(default_factory=dict)
    #: cross-encoder -> time spent scoring, all sets together
    seconds: dict[str, float] = field(default_factory=dict)
    #: ranker -> claims with an abstract of the training set, and the others -> nDCG@10
    scifact: dict[str, dict[str, float]] = field(default_factory=dict)


def measure(data: Path, names: list[str], models: list[str], seed: int, dtype: str) -> Measured:
    """Measure every reranker on every set; prints a line to standard error after each set."""
    found = Measured()
    for name in names:
        collection = SETS[name](data)
        pool = candidates(collection)
        found.ndcg.setdefault("random", {})[name] = random_order(collection, pool, seed)
        runs: dict[str, Run] = {
            "BM25": {query: dict(ranked) for query, ranked in pool.items()},
            "bi-encoder": rerank(collection, pool, bi_encoder(collection, pool)),
        }
        for model in models:
            title = "built-in" if model == str(BUILTIN_FOLDER) else model
            run, seconds = cross_encoder(model, dtype, collection, pool)
            found.seconds[title] = found.seconds.get(title, 0.0) + seconds
            runs[title] = run
            found.scores.setdefault(title, {})[name] = quantiles(collection, run)
        for ranker, run in runs.items():
            found.ndcg.setdefault(ranker, {})[name] = ndcg(collection, run)
        if name == "scifact":
            found.scifact = seen_and_unseen(collection, scifact(data, "train"), runs)
        print(name, {ranker: round(row[name], 4) for ranker, row in found.ndcg.items()}, file=sys.stderr, flush=True)
    return found


def markdown(found: Measured, names: list[str]) -> str:
    """Two tables: nDCG@10 with its mean and the gain over BM25, and the quantiles of scores."""
    lines = [f"| nDCG@10 | {' | '.join(names)} | mean | over BM25 |", "|---|" + "---:|" * (len(names) + 2)]
    base = np.mean([found.ndcg["BM25"][name] for name in names])
    for ranker, row in found.ndcg.items():
        mean = np.mean([row[name] for name in names])
        cells = " | ".join(f"{row[name]:.3f}" for name in names)
        lines.append(f"| {ranker} | {cells} | {mean:.3f} | {mean - base:+.3f} |")
    if found.scifact:
        groups = list(found.scifact["BM25"])
        lines += ["", f"| nDCG@10, SciFact's claims whose abstracts training has | {' | '.join(groups)} |"]
        lines.append("|---|" + "---:|" * len(groups))
        lines += [f"| {r} | {' | '.join(f'{row[g]:.3f}' for g in groups)} |" for r, row in found.scifact.items()]
    if found.scores:
        lines += ["", "| scores at | " + " | ".join(f"{q:.0%}" for q in QUANTILES) + " |"]
        lines.append("|---|" + "---:|" * len(QUANTILES))
    for title, sets in found.scores.items():
        for name, groups in sets.items():
            for group, values in groups.items():
                cells = " | ".join(f"{value:.3f}" for value in values)
                lines.append(f"| {title}, {name}, {group} | {cells} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the folder with scifact/, vaswani/ and cisi/")
    parser.add_argument(
        "--set", dest="sets", action="append", choices=list(SETS), help="this set (repeatable; default: those held out)"
    )
    parser.add_argument("--model", action="append", default=[], help="a further cross-encoder: a name or a path")
    parser.add_argument("--no-builtin", action="store_true", help="leave the built-in model out")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the cross-encoders")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--seed", type=int, default=0, help="of the random order")
    options = parser.parse_args(argv)
    models = ([] if options.no_builtin else [str(BUILTIN_FOLDER)]) + options.model
    names = options.sets or list(HELD_OUT)
    found = measure(options.data, names, models, options.seed, options.dtype)
    print(markdown(found, names))
    if options.json:
        options.json.write_text(json.dumps(asdict(found), indent=2) + "\n")
    return 0
