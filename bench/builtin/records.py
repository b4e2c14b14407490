"""The records that the steps read and write: small objects, one JSON object a line."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]?\s+(?=[A-Z0-9\"'(\[])")


@dataclass
class Passage:
    """A text to be found. `pool` names the collection that it is part of."""

    pool: str
    text: str
    title: str = ""


@dataclass
class Query:
    """A text to search a pool with; `relevant` are positions in the file of passages.

    `labelled` tells people's judgements from our own guess that a query belongs to the passage it was made from.
    """

    pool: str
    kind: str
    text: str
    relevant: list[int]
    labelled: bool = False
    validation: bool = False


@dataclass
class RankedList:
    """A query with its candidates and the teacher's scores of them.

    `bm25` and `cosine` are z-scores among the query's 100 candidates, `similarity` is the cosine itself. `impostor` is
    the place of the candidate that answers the question about something else, -1 where there is none.
    """

    query: int
    docs: list[int]
    bm25: list[float]
    cosine: list[float]
    similarity: list[float]
    relevant: list[bool]
    impostor: int = -1


Record = TypeVar("Record", Passage, Query, RankedList)


def write(path: Path, records: Iterable[Record]) -> None:
    """One record a line."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")


def read(path: Path, kind: type[Record]) -> list[Record]:
    """All the records of a file."""
    with open(path, encoding="utf-8") as file:
        return [kind(**json.loads(line)) for line in file]


def sentences(text: str) -> list[str]:
    """The sentences of a text, split by simple rules."""
    return [part.strip() for part in _SENTENCE_END.split(text) if part.strip()]


def windows(items: list[str], sizes: Iterator[int]) -> Iterator[list[str]]:
    """Consecutive runs of `items`, each as long as `sizes` says next."""
    start = 0
    while start < len(items):
        size = next(sizes)
        yield items[start : start + size]
        start += size
