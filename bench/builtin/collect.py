"""Step 1: collect the passages to train on, from the training sets and from documentation.

    python -m bench builtin collect --work W --data DIR --docs NAME=DIR[,DIR...] ...

Each passage is in a pool, and a query searches one pool. The pools are: abstracts; sentences of abstracts; paragraphs
and sentences of XQuAD and SQuAD (without XQuAD's last articles, which are for validation); and one for each `--docs
NAME`.
"""

import argparse
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from bench.builtin.prose import paragraphs
from bench.builtin.records import Passage, sentences, windows, write
from bench.inputs import datasets

#: passages of one file of documentation, so that a few long files do not fill a pool
PER_FILE = 15
#: XQuAD articles from this one on are for validation only
VALIDATION_ARTICLE = 40


def abstracts(data: Path) -> Iterator[Passage]:
    """SciFact's corpus (shared by its splits) and PubMedQA's abstracts."""
    for title, body in datasets.scifact_corpus(data).values():
        yield Passage("abstracts", " ".join(body), title)
    for question, abstract, _ in datasets.pubmedqa(data):
        yield Passage("abstracts", abstract, question)


def findings(data: Path, limit: int, generator: random.Random) -> Iterator[Passage]:
    """Single sentences of abstracts, and PubMedQA's conclusions: short passages that state something."""
    single = [
        Passage("findings", sentence, title)
        for title, body in datasets.scifact_corpus(data).values()
        for sentence in body
        if 8 <= len(sentence.split()) <= 60
    ]
    yield from generator.sample(single, min(limit, len(single)))
    for question, _, conclusion in datasets.pubmedqa(data):
        yield Passage("findings", conclusion, question)


def answered(data: Path, squad: list[Path]) -> Iterator[tuple[datasets.Answered, bool]]:
    """XQuAD's questions and whether each is for validation; then SQuAD's, without the articles kept for validation."""
    kept = set()
    for item in datasets.xquad(data):
        validation = item.article >= VALIDATION_ARTICLE
        if validation:
            kept.add(item.title)
        yield item, validation
    for path in squad:
        yield from ((item, False) for item in datasets.squad(path) if item.title not in kept)


def encyclopedia(data: Path, squad: list[Path]) -> Iterator[Passage]:
    """The paragraphs of XQuAD and SQuAD, whole and as sentences, each once."""
    seen = set()
    for item, validation in answered(data, squad):
        if item.paragraph in seen:
            continue
        suffix = "-validation" if validation else ""
        yield Passage("paragraphs" + suffix, item.paragraph)
        for sentence in sentences(item.paragraph):
            if sentence not in seen:
                yield Passage("sentences" + suffix, sentence)
        seen.update((item.paragraph, *sentences(item.paragraph)))


def documentation(name: str, roots: list[Path], limit: int, generator: random.Random) -> Iterator[Passage]:
    """At most `limit` passages of one to eight sentences, from files taken in random order."""
    files = sorted(path for root in roots for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    generator.shuffle(files)
    sizes = iter(lambda: generator.choice((1, 1, 2, 3, 5, 8)), 0)
    seen: set[str] = set()
    for path in files:
        taken = 0
        for heading, group in itertools.groupby(paragraphs(path), key=lambda item: item[0]):
            text = " ".join(paragraph for _, paragraph in group)
            for window in windows(sentences(text), sizes):
                passage = " ".join(window)
                if 8 <= len(passage.split()) <= 250 and passage not in seen and taken < PER_FILE:
                    seen.add(passage)
                    taken += 1
                    yield Passage(name, passage, heading)
        if len(seen) >= limit:
            return


def main(argv: list[str]) -> int:
    """Write `passages.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin collect", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--data", type=Path, required=True, help="the folder with scifact/, pubmedqa/ and xquad_en/")
    parser.add_argument("--squad", type=Path, nargs="*", default=[], help="files in SQuAD's form, whole or parts")
    parser.add_argument("--docs", action="append", default=[], metavar="NAME=DIR[,DIR]", help="a pool of documentation")
    parser.add_argument("--per-pool", type=int, default=5000, help="passages of each pool of documentation")
    parser.add_argument("--findings", type=int, default=8000, help="single sentences of abstracts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    generator = random.Random(options.seed)

    found = [*abstracts(options.data), *findings(options.data, options.findings, generator)]
    found += encyclopedia(options.data, options.squad)
    for pool in options.docs:
        name, _, roots = pool.partition("=")
        before = len(found)
        found += documentation(name, [Path(root) for root in roots.split(",")], options.per_pool, generator)
        print(f"{name}: {len(found) - before} passages", flush=True)
    options.work.mkdir(parents=True, exist_ok=True)
    write(options.work / "passages.jsonl", found)
    print(f"{len(found)} passages")
    return 0
