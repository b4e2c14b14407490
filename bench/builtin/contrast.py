"""Step 4: add passages that answer the question, but about something else.

    python -m bench builtin contrast --work W

A question's candidates are seldom about the same thing under another name. So a student learns what an answer looks
like, and not whom it is about. This step takes each question by a person that shares a name or a year with the passage
that answers it, and makes an impostor: the passage with another name of the same kind, near to the first by the
bi-encoder's cosine. In the question's list the impostor is not relevant. For every other such question there is also a
mirrored list, whose question has the new name: there the impostor is the answer, and the true passage is not relevant.
So only the question tells which of the two passages is right.

A question for validation gets a list of these two passages alone, of the kind `impostor`.
"""

import argparse
import random
import re
import statistics
from pathlib import Path

import numpy as np

from bench.builtin.records import Passage, Query, RankedList, read, write
from bench.quality.retrieval import BiEncoder

IMPOSTORS = "impostors"
#: a word with a capital that is not a sentence's first, or a year
NAME = re.compile(r"(?<=[\w,;:)] )(?:[A-Z]\w{2,}|[12]\d{3})\b")
#: the ranks, by nearness, of the names that may replace a name: the nearest ones are often other forms of it
NEAREST, FARTHEST = 3, 40


class Names:
    """The names of many texts, and for each name others that can replace it."""

    def __init__(self, texts: list[str], encoder: BiEncoder) -> None:
        self._names = sorted({name for text in texts for name in NAME.findall(text)})
        self._places = {name: place for place, name in enumerate(self._names)}
        self._vectors = encoder.encode(self._names, batch_size=256)

    def instead(self, name: str, avoid: str, generator: random.Random) -> str:
        """Another name of the kind, none that is in the text `avoid` or begins like `name`."""
        near = np.argsort(-(self._vectors @ self._vectors[self._places[name]]))[NEAREST:FARTHEST]
        fit = [self._names[place] for place in near]
        fit = [other for other in fit if other not in avoid and (name.isdigit() or other[:4] != name[:4])]
        return generator.choice(fit or self._names)


def swap(text: str, names: dict[str, str]) -> str:
    """`text` with every name replaced."""
    return re.sub(rf"\b({'|'.join(map(re.escape, names))})\b", lambda found: names[found[0]], text)


def replacements(question: str, answer: str, names: Names, generator: random.Random) -> dict[str, str]:
    """New names for one of the names that both texts share, or for all of them; none if they share none."""
    shared = [name for name in dict.fromkeys(NAME.findall(question)) if re.search(rf"\b{name}\b", answer)]
    if len(shared) > 1 and generator.random() < 0.5:
        shared = [generator.choice(shared)]
    return {name: names.instead(name, question + answer, generator) for name in shared}


def with_impostor(item: RankedList, impostor: int) -> RankedList:
    """The list with one more candidate, which is not relevant and has an average candidate's scores."""
    return RankedList(
        query=item.query,
        docs=[*item.docs, impostor],
        bm25=[*item.bm25, round(statistics.median(item.bm25), 3)],
        cosine=[*item.cosine, round(statistics.median(item.cosine), 3)],
        similarity=[*item.similarity, round(statistics.median(item.similarity), 4)],
        relevant=[*item.relevant, False],
        impostor=len(item.docs),
    )


def mirrored(item: RankedList, query: int, answer: int, impostor: int, strangers: set[int]) -> RankedList:
    """The list of the question with the new names: answer and impostor swapped, and of the others only `strangers`."""
    known = item.docs.index(answer)
    kept = [place for place, doc in enumerate(item.docs) if doc in strangers or place == known]
    whole = with_impostor(item, answer)
    kept.append(whole.impostor)
    docs = [impostor if place == known else whole.docs[place] for place in kept]
    return RankedList(
        query=query,
        docs=docs,
        bm25=[whole.bm25[place] for place in kept],
        cosine=[whole.cosine[place] for place in kept],
        similarity=[whole.similarity[place] for place in kept],
        relevant=[place == known for place in kept],
        impostor=len(docs) - 1,
    )


def only_the_two(query: int, answer: int, impostor: int) -> RankedList:
    """The list of the answer and its impostor, without the teacher's scores."""
    return RankedList(query, [answer, impostor], [0.0] * 2, [0.0] * 2, [0.0] * 2, [True, False], 1)


def main(argv: list[str]) -> int:
    """Add to `passages.jsonl`, `queries.jsonl` and `lists.jsonl`; a second run adds nothing."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin contrast", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    generator = random.Random(options.seed)
    passages, queries = read(options.work / "passages.jsonl", Passage), read(options.work / "queries.jsonl", Query)
    lists = read(options.work / "lists.jsonl", RankedList)
    if any(passage.pool == IMPOSTORS for passage in passages):
        return 0

    asked = [query.text for query in queries if query.kind == "squad"]
    names = Names([*asked, *(item.text for item in passages if item.pool == "paragraphs")], BiEncoder())
    found = []
    for item in lists:
        query = queries[item.query]
        answer = item.docs[item.relevant.index(True)] if query.kind == "squad" and any(item.relevant) else None
        new = replacements(query.text, passages[answer].text, names, generator) if answer is not None else {}
        if not new:
            found.append(item)
            continue
        impostor = len(passages)
        passages.append(Passage(IMPOSTORS, swap(passages[answer].text, new)))
        mirror = Query(query.pool, query.kind, swap(query.text, new), [impostor], True, query.validation)
        if query.validation:
            queries.append(Query(query.pool, "impostor", query.text, [answer], True, True))
            mirror.kind = "impostor"
            queries.append(mirror)
            found += [item, only_the_two(len(queries) - 2, answer, impostor)]
            found.append(only_the_two(len(queries) - 1, impostor, answer))
            continue
        found.append(with_impostor(item, impostor))
        if generator.random() < 0.5:
            queries.append(mirror)
            strangers = {doc for doc in item.docs if not any(name in passages[doc].text for name in new)}
            found.append(mirrored(item, len(queries) - 1, answer, impostor, strangers))
    generator.shuffle(found)
    for name, records in (("passages", passages), ("queries", queries), ("lists", found)):
        write(options.work / f"{name}.jsonl", records)
    made = sum(passage.pool == IMPOSTORS for passage in passages)
    print(f"{made} impostors, {len(found) - len(lists)} more lists")
    return 0
