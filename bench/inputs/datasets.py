"""Readers of test collections and of labelled training sets: they read files and return plain objects.

Each reader takes the folder with all sets (`--data`). No reader changes a text, so that results hold for the sets as
they were published.
"""

import csv
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

_QUOTED = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"")


@dataclass(frozen=True)
class Collection:
    """A test collection: documents, queries, and the grade of each judged document (`qrels[query][doc] = grade`)."""

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]] = field(repr=False)


@dataclass(frozen=True)
class Answered:
    """A question, and the place of its answer in a paragraph (XQuAD, SQuAD)."""

    article: int
    title: str
    paragraph: str
    question: str
    answer: str
    start: int


def numpy_strings(text: str) -> list[str]:
    """The strings of a printed NumPy array. SciFact's CSV files have an abstract's sentences in this form."""
    found = (single or double for single, double in _QUOTED.findall(text))
    return [item.replace("\\n", " ").replace("\\'", "'").replace('\\"', '"').strip() for item in found]


def scifact_corpus(data: Path) -> dict[str, tuple[str, list[str]]]:
    """Every SciFact abstract as (title, sentences); all splits have the same corpus."""
    csv.field_size_limit(1 << 24)
    with open(data / "scifact" / "corpus_train.csv", newline="", encoding="utf-8") as file:
        return {row["doc_id"]: (row["title"], numpy_strings(row["abstract"])) for row in csv.DictReader(file)}


def _scifact_claims(data: Path) -> dict[str, str]:
    claims = {}
    for name in ("claims_train.csv", "claims_validation.csv", "claims_test.csv"):
        with open(data / "scifact" / name, newline="", encoding="utf-8") as file:
            claims.update({row["id"]: row["claim"] for row in csv.DictReader(file)})
    return claims


def scifact(data: Path, split: str) -> Collection:
    """SciFact as BEIR has it: `test` is the original validation claims, `train` the original training claims."""
    qrels = _tsv_qrels(data / "scifact" / f"beir_qrels_{split}.tsv")
    claims = _scifact_claims(data)
    documents = {key: f"{title} {' '.join(body)}" for key, (title, body) in scifact_corpus(data).items()}
    return Collection("SciFact " + split, documents, {key: claims[key] for key in qrels}, qrels)


def vaswani(data: Path) -> Collection:
    """The NPL collection: 11,429 short abstracts on electronics and physics, 93 queries."""
    folder = data / "vaswani"
    documents = {}
    for block in re.findall(r"<DOC>(.*?)</DOC>", (folder / "doc-text.trec").read_text(), re.S):
        key, text = re.match(r"\s*<DOCNO>(.*?)</DOCNO>(.*)", block, re.S).groups()
        documents[key.strip()] = " ".join(text.split())
    queries = {
        key.strip(): " ".join(text.lower().split())
        for key, text in re.findall(
            r"<num>(.*?)</num>\s*<title>(.*?)</title>", (folder / "query-text.trec").read_text(), re.S
        )
    }
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels").read_text().splitlines():
        query, _, doc, grade = line.split()
        qrels.setdefault(query, {})[doc] = int(grade)
    return Collection("Vaswani", documents, queries, qrels)


def cisi(data: Path) -> Collection:
    """CISI: 1,460 abstracts of information science; the queries that have relevance judgements (76 of 112)."""
    folder = data / "cisi"
    texts = {key: _whole(part) for key, part in _smart(folder / "CISI.QRY")}
    qrels = _columns(folder / "CISI.REL")
    documents = {key: _whole(part) for key, part in _smart(folder / "CISI.ALL")}
    return Collection("CISI", documents, {key: texts[key] for key in qrels}, qrels)


def cranfield(data: Path) -> Collection:
    """Cranfield: 1,400 abstracts of aeronautics, 225 questions. The judgements number the questions by their place."""
    folder = data / "cranfield"
    documents = {key: part.get("W", "") for key, part in _smart(folder / "cran.all.1400")}  # begins with the title
    texts = {str(place): part["W"] for place, (_, part) in enumerate(_smart(folder / "cran.qry"), 1)}
    return Collection("Cranfield", documents, texts, _columns(folder / "cranqrel"))


def cacm(data: Path) -> Collection:
    """CACM: 3,204 papers of computer science, half of them a title alone; the 52 queries that have judgements."""
    folder = data / "cacm"
    documents = {key: _whole(part) for key, part in _smart(folder / "cacm.all")}
    texts = {key: _whole(part) for key, part in _smart(folder / "query.text")}
    judged = _columns(folder / "qrels.text")  # writes 1 as 01 and 0001
    qrels = {str(int(query)): {str(int(doc)): 1 for doc in grades} for query, grades in judged.items()}
    return Collection("CACM", documents, {key: texts[key] for key in qrels}, qrels)


def lisa(data: Path) -> Collection:
    """LISA: 5,999 abstracts of library science in capitals, 35 long queries, with keywords at their end."""
    folder = data / "lisa"
    blocks = re.findall(
        r"^Document +(\d+)\s*\n(.*?)^\*{40,}", (folder / "lisa.all.txt").read_text("latin-1"), re.M | re.S
    )
    asked = re.findall(r"^(\d+)\n([^#]*)#", (folder / "lisa.queries.txt").read_text("latin-1"), re.M)
    qrels: dict[str, dict[str, int]] = {}
    numbers = iter((folder / "lisa.relevance.txt").read_text().split())
    for query in numbers:
        qrels[query] = {next(numbers): 1 for _ in range(int(next(numbers)))}
    documents = {key: " ".join(text.split()) for key, text in blocks}
    return Collection("LISA", documents, {key: " ".join(text.split()) for key, text in asked}, qrels)


def xquad(data: Path) -> list[Answered]:
    """XQuAD in English: 1,190 questions of SQuAD's development set on 240 paragraphs of 48 articles."""
    return squad(data / "xquad_en" / "xquad.en.json")


def squad(path: Path) -> list[Answered]:
    """The answerable questions of one file in SQuAD's form (1.1 or 2.0), whole or a part of it."""
    articles = json.loads(path.read_text(encoding="utf-8"))["data"]
    return [
        Answered(number, article["title"], paragraph["context"], qa["question"], answer["text"], answer["answer_start"])
        for number, article in enumerate(articles)
        for paragraph in article["paragraphs"]
        for qa in paragraph["qas"]
        for answer in qa["answers"][:1]
    ]


def pubmedqa(data: Path) -> list[tuple[str, str, str]]:
    """PubMedQA's labelled part: (question, abstract, conclusion) of 1,000 papers whose title is a question."""
    rows = json.loads((data / "pubmedqa" / "ori_pqal.json").read_text(encoding="utf-8"))
    return [(row["QUESTION"], " ".join(row["CONTEXTS"]), row["LONG_ANSWER"]) for row in rows.values()]


#: the three sets that `bench quality` measures; the built-in model is not trained or developed on them
HELD_OUT: dict[str, Callable[[Path], Collection]] = {
    "scifact": lambda data: scifact(data, "test"),
    "vaswani": vaswani,
    "cisi": cisi,
}
#: the sets for decisions about the built-in model (`bench builtin average`); it is not trained on them
DEVELOPMENT: dict[str, Callable[[Path], Collection]] = {"cranfield": cranfield, "cacm": cacm, "lisa": lisa}


def _tsv_qrels(path: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file, delimiter="\t"):
            qrels.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
    return qrels


def _columns(path: Path) -> dict[str, dict[str, int]]:
    """Judgements, a line each, `query document ...`: a listed document is relevant unless its code is -1."""
    qrels: dict[str, dict[str, int]] = {}
    for query, doc, *rest in filter(None, map(str.split, path.read_text().splitlines())):
        qrels.setdefault(query, {})[doc] = int(rest[:1] != ["-1"])
    return qrels


def _whole(part: dict[str, str]) -> str:
    return f"{part.get('T', '')} {part.get('W', '')}".strip()


def _smart(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The records of a file in SMART format: `.I 1`, then fields such as `.T` (title) and `.W` (text)."""
    for record in re.split(r"^\.I ", path.read_text(encoding="latin-1"), flags=re.M)[1:]:
        key, *rest = re.split(r"^\.([A-Z])[ \t]*\n", record, flags=re.M)
        fields = dict(zip(rest[::2], (" ".join(text.split()) for text in rest[1::2]), strict=True))
        yield key.strip(), fields
