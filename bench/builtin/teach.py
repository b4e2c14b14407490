"""Step 3: score the queries' passages with the teacher.

    python -m bench builtin teach --work W

The teacher is the sum of two z-scores, of the bi-encoder's cosine and of BM25, over BM25's 100 best passages of a
query's pool. A student's list has the relevant passages, the teacher's best ones, some of BM25's best, some at random,
and the nearest by cosine in the whole pool, which may share no word with the query. Every second made query loses the
passage that it was made from, and a made description always does, so that the student must also rank passages that no
query was made from.

A logistic regression on the labelled queries turns (BM25, cosine) into a probability: `calibration.json`.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from bench.builtin.records import Passage, Query, RankedList, read, write
from bench.quality.retrieval import BM25, BiEncoder

DEPTH = 100
#: passages of a list: the teacher's best, BM25's best, the nearest by cosine, random candidates, random from the pool
BEST, LEXICAL, NEAREST, OTHERS, STRANGERS = 6, 4, 4, 7, 2


def z_scores(values: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """How many standard deviations of `sample` the values are from its mean."""
    return (values - sample.mean()) / (sample.std() + 1e-6)


def choose(
    query: Query,
    found: np.ndarray,
    teacher: np.ndarray,
    nearest: np.ndarray,
    pool: list[int],
    generator: random.Random,
) -> list[int]:
    """The passages of one list, in random order."""
    skip = set() if query.labelled or (query.kind != "description" and generator.random() < 0.5) else {*query.relevant}
    ranked = [int(found[i]) for i in np.argsort(-teacher)]
    candidates = [int(i) for i in found]
    chosen = dict.fromkeys(query.relevant)
    chosen.update(dict.fromkeys(ranked[:BEST]))
    chosen.update(dict.fromkeys(candidates[:LEXICAL]))
    chosen.update(dict.fromkeys(int(i) for i in nearest))
    chosen.update(dict.fromkeys(generator.sample(candidates, min(OTHERS, len(candidates)))))
    chosen.update(dict.fromkeys(generator.sample(pool, min(STRANGERS, len(pool)))))
    kept = [doc for doc in chosen if doc not in skip]
    generator.shuffle(kept)
    return kept


def features(lists: list[RankedList]) -> np.ndarray:
    """The features of the probability, a row for each candidate."""
    return np.array([row for item in lists for row in zip(item.bm25, item.cosine, item.similarity, strict=True)])


def main(argv: list[str]) -> int:
    """Write `lists.jsonl` and `calibration.json`."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin teach", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    generator = random.Random(options.seed)
    passages, queries = read(options.work / "passages.jsonl", Passage), read(options.work / "queries.jsonl", Query)

    encoder = BiEncoder()
    vectors = encoder.encode(
        [f"{item.title} {item.text}" if item.pool == "abstracts" else item.text for item in passages], half=True
    )
    questions = encoder.encode([item.text for item in queries], half=True)

    members, wanted = defaultdict(list), defaultdict(list)
    for number, passage in enumerate(passages):
        members[passage.pool].append(number)
    for number, query in enumerate(queries):
        wanted[query.pool].append(number)
    lists = []
    for pool, numbers in wanted.items():
        places = np.array(members[pool])
        index = BM25([passages[i].text for i in places])
        found, scores = index.top([queries[i].text for i in numbers], DEPTH)
        for number, rows, bm25 in zip(numbers, found, scores, strict=True):
            query, docs = queries[number], places[rows]
            cosine = vectors[docs] @ questions[number]
            teacher = z_scores(cosine, cosine) + z_scores(bm25, bm25)
            nearest = places[np.argpartition(vectors[places] @ questions[number], -NEAREST)[-NEAREST:]]
            chosen = choose(query, docs, teacher, nearest, members[pool], generator)
            known = dict(zip(docs.tolist(), bm25.tolist(), strict=True))
            similarity = vectors[chosen] @ questions[number]
            lexical = np.array([known.get(doc, min(bm25)) for doc in chosen])
            lists.append(
                RankedList(
                    query=number,
                    docs=chosen,
                    bm25=z_scores(lexical, bm25).round(3).tolist(),
                    cosine=z_scores(similarity, cosine).round(3).tolist(),
                    similarity=similarity.round(4).tolist(),
                    relevant=[doc in query.relevant for doc in chosen],
                )
            )
        print(f"{pool}: {len(numbers)} lists", flush=True)
    generator.shuffle(lists)
    write(options.work / "lists.jsonl", lists)

    known = [item for item in lists if queries[item.query].labelled and not queries[item.query].validation]
    model = LogisticRegression(C=10.0).fit(features(known), [flag for item in known for flag in item.relevant])
    calibration = {"weights": model.coef_[0].round(4).tolist(), "bias": round(float(model.intercept_[0]), 4)}
    (options.work / "calibration.json").write_text(json.dumps(calibration) + "\n")
    print(f"{len(lists)} lists, {sum(len(item.docs) for item in lists)} pairs; {calibration}")
    return 0
