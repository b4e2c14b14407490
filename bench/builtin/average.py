"""Step 6: average the model's weights with those from before its last training.

    python -m bench builtin average --model W/third --before W/second --data DEV --out W/average

A training on some texts makes a model worse on others. An average of the weights before and after the training brings
back a part (Wortsman et al., Robust fine-tuning of zero-shot models, 2022). The development sets decide how large the
share of the earlier weights is; they are used for no training and for no published figure. Of SHARES, which include 0,
the step chooses the one with the highest mean of nDCG@10 on BM25's 100 best documents, among those that get the
README's first example right.
"""

import argparse
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer
from transformers import BertForSequenceClassification

from bench import ROOT
from bench.builtin.export import write_files
from bench.inputs.datasets import DEVELOPMENT
from bench.quality.ndcg import candidates, cross_encoder, ndcg
from bench.quality.retrieval import fast_dtype
from mp_rerank import ModelSpec, RerankerPool

#: shares of the weights from before the training
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
#: the README's first example
QUESTION = "How many people live in Berlin?"
EXAMPLE = ROOT / "examples" / "berlin.txt"


def average(
    after: BertForSequenceClassification, before: BertForSequenceClassification, share: float
) -> BertForSequenceClassification:
    """A model with averaged weights, of which `share` is the part of `before`; neither model is changed."""
    model = BertForSequenceClassification(after.config).eval()
    earlier = before.state_dict()
    model.load_state_dict({name: value.lerp(earlier[name], share) for name, value in after.state_dict().items()})
    return model


def answers_the_example(folder: str) -> bool:
    """Whether Berlin's population comes first for the README's question."""
    lines = EXAMPLE.read_text(encoding="utf-8").splitlines()
    with RerankerPool(ModelSpec(folder), devices="cpu", workers=1) as pool:
        return "population" in lines[pool.rerank(QUESTION, lines, top_n=1)[0].index]


def main(argv: list[str]) -> int:
    """Measure every share, print the table, and write the model of the best."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin average", description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="what the last training made, exported")
    parser.add_argument("--before", type=Path, required=True, help="what it started from, exported")
    parser.add_argument("--data", type=Path, required=True, help=f"the folder with {', '.join(DEVELOPMENT)}")
    parser.add_argument("--out", type=Path, required=True, help="the folder of the average")
    options = parser.parse_args(argv)
    after, before = map(BertForSequenceClassification.from_pretrained, (options.model, options.before))
    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    collections = {name: read(options.data) for name, read in DEVELOPMENT.items()}
    found = {name: candidates(collection) for name, collection in collections.items()}

    bm25 = [ndcg(collections[name], {query: dict(ranked) for query, ranked in found[name].items()}) for name in found]
    print(f"| share | {' | '.join(DEVELOPMENT)} | mean |\n|---|{'---:|' * (len(DEVELOPMENT) + 1)}")
    print(f"| BM25 | {' | '.join(f'{value:.4f}' for value in [*bm25, sum(bm25) / len(bm25)])} |", flush=True)
    means = {}
    for share in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            write_files(average(after, before, share), tokenizer, Path(folder))
            if not answers_the_example(folder):
                print(f"| {share} | the README's example is wrong |", flush=True)
                continue
            values = [
                ndcg(collections[name], cross_encoder(folder, fast_dtype(), collections[name], found[name])[0])
                for name in DEVELOPMENT
            ]
        means[share] = sum(values) / len(values)
        print(f"| {share} | {' | '.join(f'{value:.4f}' for value in [*values, means[share]])} |", flush=True)
    if not means:
        print("no share gets the README's example right: the training has to be another")
        return 1
    best = max(means, key=means.__getitem__)
    average(after, before, best).save_pretrained(options.out)
    tokenizer.save(str(options.out / "tokenizer.json"))
    print(json.dumps({"share": best, "mean": round(means[best], 4)}))
    return 0
