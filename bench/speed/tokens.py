"""`python -m bench tokens`: texts as tokens, from words seen before and by the tokenizer's library alone, on one core.

The texts are new ones from beginning to end, as to a worker whose agents ask about one subject: random words, Python's
manual and, with `--data`, test collections. The first quarter of them meets hardly a word that was seen before. Random
numbers are the worst: none of them was ever seen before, and a worker soon takes such texts whole.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as algorithms
from transformers import AutoTokenizer

from bench.inputs.datasets import cisi, scifact_corpus, vaswani
from bench.inputs.models import Pairs, make_requests
from bench.reports.files import add_output, finish
from bench.reports.report import Report
from mp_rerank._engine.words import WordTokenizer
from mp_rerank.config import BUILTIN_FOLDER

DOCUMENTS = 16
WORDS = 60
LIMIT = 512
QUARTERS = 4


def main(argv: Sequence[str]) -> int:
    """Measure each tokenizer with each kind of text and write."""
    parser = argparse.ArgumentParser(prog="python -m bench tokens", description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--data", type=Path, help="the folder with scifact/, vaswani/ and cisi/ (default: none of them)"
    )
    add_output(parser)
    options = parser.parse_args(argv)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    report = Report.begin("tokens", "Tokens", options)
    kinds = dict(texts(options.data))
    for name, backend in tokenizers(
        [document for kind in kinds.values() for request in kind for _, document in request]
    ):
        for kind, requests in kinds.items():
            measure(report, {"tokenizer": name, "texts": kind}, backend, requests)
    finish(report, options.out)
    return 0


def texts(data: Path | None) -> Iterator[tuple[str, list[Pairs]]]:
    """Requests of each kind of text."""
    yield "random words", make_requests(256, DOCUMENTS, WORDS)
    chance = random.Random(0)
    numbers = [" ".join(f"{chance.getrandbits(40):010x}" for _ in range(WORDS // 4)) for _ in range(256 * DOCUMENTS)]
    yield "random numbers", _requests(numbers)
    yield "Python's manual", _requests([passage for topic in topics.values() for passage in _passages(topic)])
    if data is not None:
        abstracts = scifact_corpus(data).values()
        yield "SciFact", _requests([" ".join([title, *sentences]) for title, sentences in abstracts])
        yield "Vaswani", _requests(list(vaswani(data).documents.values()))
        yield "CISI", _requests(list(cisi(data).documents.values()))


def tokenizers(documents: list[str]) -> Iterator[tuple[str, Tokenizer]]:
    """BERT's kind, the built-in model's; and ModernBERT's kind, trained on these documents."""
    yield "WordPiece", AutoTokenizer.from_pretrained(BUILTIN_FOLDER).backend_tokenizer
    backend: Any = Tokenizer(algorithms.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[CLS]", "[SEP]", *(" " * count for count in range(2, 25))]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        documents,
        trainers.BpeTrainer(vocab_size=30_000, initial_alphabet=alphabet, special_tokens=special, show_progress=False),
    )
    pair = "[CLS] $A [SEP] $B [SEP]"
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair=pair, special_tokens=[("[CLS]", 0), ("[SEP]", 1)]
    )
    yield "byte-level BPE", backend


def measure(report: Report, of: dict[str, str], backend: Tokenizer, requests: list[Pairs]) -> None:
    """Tokenize each request in both ways, by turns."""
    by_words = WordTokenizer(backend)
    quarter = len(requests) // QUARTERS
    theirs, ours, tokens = [0.0] * QUARTERS, [0.0] * QUARTERS, 0
    for number, request in enumerate(requests[: quarter * QUARTERS]):
        queries, documents = zip(*request, strict=True)
        seconds, encodings = _timed(lambda request=request: by_library(backend, request))
        theirs[number // quarter] += seconds
        seconds, found = _timed(lambda a=queries, b=documents: by_words.pairs(a, b, LIMIT))
        ours[number // quarter] += seconds
        for ids, pair in zip(encodings, found, strict=True):
            assert pair is not None
            assert pair.ids == ids
        tokens += sum(map(len, encodings))
    pairs = quarter * DOCUMENTS
    report.add(of, "tokens a pair", tokens / (QUARTERS * pairs), better="")
    report.add(of, "library, us a pair", [seconds / pairs * 1e6 for seconds in theirs], better="lower")
    for name, part in (("first", 0), ("last", -1)):
        report.add(of, f"words, {name} quarter, us a pair", ours[part] / pairs * 1e6, better="lower")
        report.add(of, f"times the library, {name} quarter", theirs[part] / ours[part], better="higher")


def by_library(backend: Tokenizer, request: Pairs) -> list[list[int]]:
    """The tokens of pairs, as the library makes them in the fastest of its ways."""
    backend.enable_truncation(LIMIT)
    return [encoding.ids for encoding in backend.encode_batch_fast(request)]


def _requests(documents: list[str]) -> list[Pairs]:
    """Requests for all documents in their order; a query is the beginning of another request's document."""
    groups = [documents[i : i + DOCUMENTS] for i in range(0, len(documents), DOCUMENTS)]
    queries = [" ".join(group[0].split()[:8]) for group in groups]
    return [
        [(query, document) for document in group]
        for query, group in zip(queries[1:] + queries[:1], groups, strict=True)
    ]


def _passages(text: str) -> Iterator[str]:
    """Consecutive paragraphs of ``text``, about as many words together."""
    passage = ""
    for paragraph in text.split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage.split()) >= WORDS:
            yield passage.strip()
            passage = ""


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = call()
    return time.perf_counter() - start, found
