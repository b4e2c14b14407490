"""Step 2: write queries for the passages.

    python -m bench builtin queries --work W --data DIR

Queries by people come from SciFact's training claims, PubMedQA, XQuAD and SQuAD. The others are made from passages, in
the forms in which people search: a title; a sentence; a sentence with words missing; several sentences, as a long
description; a few key terms; "what is" and "how to" questions; and questions for a number, a year, a name or a place,
made from a sentence without that answer.
"""

import argparse
import collections
import math
import random
import re
from collections.abc import Callable
from pathlib import Path

from bench.builtin.collect import answered
from bench.builtin.records import Passage, Query, read, sentences, write
from bench.inputs import datasets

_WORD = re.compile(r"[A-Za-z][A-Za-z0-9'-]*|\d[\d.,]*")
_STOP = frozenset(
    _WORD.findall(
        "a an and are as at be been being but by can could did do does each for from had has have if in into"
        " is it its may more most no nor not of on or other our should so some such than that the their them"
        " then there these they this those to was we were what when where which while who will with within"
        " would you your also only any all"
    )
)
_NUMBER = re.compile(
    r"(?<![\w.-])(?:\d[\d,.]*|two|three|four|five|six|seven|eight|nine|ten|dozens|hundreds|thousands|millions)\b(?!-)"
)
_YEAR = re.compile(r"(?:in|since|until|by|on)\s+(?:[A-Z][a-z]+\s+(?:\d{1,2},\s+)?)?(?:1[5-9]|20)\d\d\b")
_NAME = re.compile(
    r"(?<=[a-z,] )(?:[A-Z][a-z]+ )+[A-Z][a-z]+\b|^[A-Z][a-z]+ [A-Z][a-z]+(?= (?:was|is|has|had|wrote|led))"
)
_PLACE = re.compile(r"\b(?:in|at|near|from)\s+(?:the\s+)?[A-Z][a-z]{3,}(?:\s+[A-Z][a-z]+)*(?=[\s,.])")
_DEFINITION = re.compile(
    r"^(?:The |An? )?([A-Za-z][\w-]*(?: [\w-]+){0,3}?) (?:is|are|refers to|means) (?:an?|the|used)\b"
)

#: makes a query of one kind from a passage, or none if the passage does not suit the kind
Maker = Callable[[Passage, random.Random], str | None]


class Rarity:
    """How rare words are among all passages, for the choice of key terms."""

    def __init__(self, passages: list[Passage]) -> None:
        counts = collections.Counter(word for item in passages for word in set(_WORD.findall(item.text.lower())))
        self._idf = {word: math.log(len(passages) / count) for word, count in counts.items() if count > 2}

    def content(self, text: str) -> list[str]:
        """The words that carry meaning, in their order, each once."""
        words = dict.fromkeys(word.lower() for word in _WORD.findall(text))
        return [word for word in words if word not in _STOP and (len(word) > 2 or word.isdigit())]

    def key_terms(self, text: str, count: int, generator: random.Random) -> list[str]:
        """Some of the rarest words that other passages have too."""
        words = [word for word in self.content(text) if word in self._idf]
        ranked = sorted(words, key=lambda word: -min(self._idf[word], 7.5) * generator.uniform(0.4, 1))
        return ranked[:count]


def title(passage: Passage, generator: random.Random) -> str | None:
    """The heading, if it has a meaning of its own."""
    return passage.title if 2 <= len(passage.title.split()) <= 25 else None


def sentence(passage: Passage, generator: random.Random) -> str | None:
    """One of the passage's sentences, unchanged."""
    fit = [item for item in sentences(passage.text) if 5 <= len(item.split()) <= 30]
    return generator.choice(fit) if fit else None


def thinned(passage: Passage, generator: random.Random) -> str | None:
    """A sentence of which a third to two thirds of the words are left."""
    chosen = sentence(passage, generator)
    if chosen is None:
        return None
    keep = generator.uniform(0.35, 0.7)
    words = [word for word in chosen.split() if generator.random() < keep]
    return " ".join(words).strip(" .,;:") if len(words) >= 3 else None


def description(passage: Passage, generator: random.Random) -> str | None:
    """Several sentences in a row, 25 to 150 words with some missing, as a long description of what is searched."""
    parts = sentences(passage.text)
    if len(parts) < 2:
        return None
    first, wanted = generator.randrange(len(parts) - 1), generator.randint(25, 150)
    keep = generator.choice((1.0, 0.85, 0.7))
    words = [word for part in parts[first:] for word in part.split() if generator.random() < keep]
    if len(words) < 25:
        return None
    opening = generator.choice(
        ("", "", "", "I am looking for work on ", "I am interested in ", "This is about ", "Find studies of ")
    )
    return opening + " ".join(words[:wanted]).strip(" ,;:")


def cloze_question(passage: Passage, generator: random.Random) -> str | None:
    """A question whose answer is a number, a time, a name or a place that a sentence of the passage gives."""
    options = []
    for item in sentences(passage.text):
        for pattern, words in (
            (_NUMBER, ("how many", "how many", "how much", "what number of")),
            (_YEAR, ("when", "in what year", "when did", "what year")),
            (_NAME, ("who", "who", "whose", "which person")),
            (_PLACE, ("where", "where", "in which place", "what country or place")),
        ):
            found = pattern.search(item)
            if found and 6 <= len(item.split()) <= 40:
                options.append((item, found, words))
    if not options:
        return None
    item, found, words = generator.choice(options)
    before, after = item[: found.start()].split(), item[found.end() :].split()
    near = after[:8] + before[-6:] if generator.random() < 0.6 else before[-6:] + after[:6]
    kept = [word.strip('.,;:()"') for word in near if generator.random() < 0.85]
    kept = [word if word.isupper() else word.lower() for word in kept if word]
    if sum(word not in _STOP for word in kept) < 2:
        return None
    mark = "?" if generator.random() < 0.6 else ""
    return f"{generator.choice(words)} {' '.join(kept)}{mark}"


def definition(passage: Passage, generator: random.Random) -> str | None:
    """A "what is" question, from a sentence that says what something is."""
    for item in sentences(passage.text):
        found = _DEFINITION.match(item)
        if found and found[1].split()[0].lower() not in _STOP:
            form = generator.choice(("what is {}", "what is {}?", "{} definition", "what does {} mean?", "define {}"))
            return form.format(found[1].lower())
    return None


def how_to(passage: Passage, generator: random.Random) -> str | None:
    """A "how to" question, from a heading or a sentence that begins with an action."""
    for item in (passage.title, *sentences(passage.text)[:2]):
        words = item.strip(" .").split()
        if 3 <= len(words) <= 16 and re.fullmatch(r"[A-Z][a-z]{2,}(?:ing|es|s|e|t|d)", words[0]):
            verb = words[0].lower()
            if verb.endswith("s") and not verb.endswith("ss") and words[1].lower() in ("a", "an", "the", "all", "one"):
                verb = verb[:-1]
            elif not verb.endswith("ing"):
                continue
            rest = " ".join(words[1:])
            form = "{} {}" if verb.endswith("ing") else generator.choice(("how to {} {}", "how do I {} {}?", "{} {}"))
            return form.format(verb, rest[:1].lower() + rest[1:])
    return None


def makers(rarity: Rarity) -> list[tuple[str, Maker, float]]:
    """Every kind of query as (kind, maker, share); the share says how often it is tried first."""

    def key_terms(passage: Passage, generator: random.Random) -> str | None:
        terms = rarity.key_terms(passage.text, generator.randint(2, 7), generator)
        if generator.random() < 0.5:
            generator.shuffle(terms)
        return " ".join(terms) if len(terms) >= 2 else None

    def topic(passage: Passage, generator: random.Random) -> str | None:
        terms = rarity.key_terms(f"{passage.title} {passage.text}", generator.randint(2, 4), generator)
        form = generator.choice(
            ("what is known about {} and {}?", "how does {} affect {}?", "the use of {} in {}", "{} of {}",
             "what is the relation between {} and {}?", "methods for {} {}", "which {} have {}?", "why {} {}?")
        )  # fmt: skip
        return form.format(terms[0], " ".join(terms[1:])) if len(terms) >= 2 else None

    return [
        ("title", title, 0.2),
        ("description", description, 0.25),
        ("sentence", sentence, 0.13),
        ("thinned", thinned, 0.15),
        ("key terms", key_terms, 0.17),
        ("topic", topic, 0.1),
        ("cloze", cloze_question, 0.15),
        ("definition", definition, 0.05),
        ("how to", how_to, 0.05),
    ]


def labelled(data: Path, squad: list[Path], passages: list[Passage]) -> list[Query]:
    """The training sets' own questions; a tenth or so of each is for validation."""
    places = {(item.pool, item.text): number for number, item in enumerate(passages)}
    found = []

    corpus = datasets.scifact_corpus(data)
    train = datasets.scifact(data, "train")
    for number, (query, claim) in enumerate(train.queries.items()):
        relevant = [places["abstracts", " ".join(corpus[doc][1])] for doc in train.qrels[query]]
        found.append(Query("abstracts", "claim", claim, relevant, True, number % 8 == 0))

    for number, (question, abstract, conclusion) in enumerate(datasets.pubmedqa(data)):
        for pool, text in (("abstracts", abstract), ("findings", conclusion)):
            found.append(Query(pool, "pubmedqa", question, [places[pool, text]], True, number % 8 == 0))
        abstract_place = [places["abstracts", abstract]]
        found.append(Query("abstracts", "conclusion", conclusion, abstract_place, True, number % 8 == 0))

    for item, validation in answered(data, squad):
        suffix = "-validation" if validation else ""
        paragraph = places["paragraphs" + suffix, item.paragraph]
        found.append(Query("paragraphs" + suffix, "squad", item.question, [paragraph], True, validation))
        position = 0
        for text in sentences(item.paragraph):
            position = item.paragraph.index(text, position)
            if position <= item.start < position + len(text):
                place = places["sentences" + suffix, text]
                found.append(Query("sentences" + suffix, "squad", item.question, [place], True, validation))
    return found


def made(passages: list[Passage], count: int, generator: random.Random, labels: list[Query]) -> list[Query]:
    """`count` queries made from passages, the pools with human text drawn more often than documentation.

    None from a passage that answers a query of `labels` kept for validation: its title may be that query.
    """
    rarity = Rarity(passages)
    kinds = makers(rarity)
    weight = {"abstracts": 3.0, "findings": 1.5, "sentences": 4.0, "paragraphs": 6.0}
    held = {number for query in labels if query.validation for number in query.relevant}
    usable = [n for n, item in enumerate(passages) if n not in held and not item.pool.endswith("-validation")]
    weights = [weight.get(passages[number].pool, 1.0) for number in usable]
    found: dict[str, Query] = {}
    while len(found) < count:
        number = _draw(usable, weights, generator)
        passage = passages[number]
        kind, maker, _ = generator.choices(kinds, [share for *_, share in kinds])[0]
        text = maker(passage, generator)
        if text and 2 <= len(text.split()) <= 160 and text not in found:
            found[text] = Query(passage.pool, kind, text, [number])
    return list(found.values())


def _draw(items: list[int], weights: list[float], generator: random.Random) -> int:
    """One random item by rejection sampling: `random.choices` would sum all weights for every draw."""
    top = max(weights)
    while True:
        place = generator.randrange(len(items))
        if generator.random() * top < weights[place]:
            return items[place]


def main(argv: list[str]) -> int:
    """Write `queries.jsonl`."""
    parser = argparse.ArgumentParser(prog="python -m bench builtin queries", description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="the folder of intermediate files")
    parser.add_argument("--data", type=Path, required=True, help="the folder with scifact/, pubmedqa/ and xquad_en/")
    parser.add_argument("--squad", type=Path, nargs="*", default=[], help="the same files as for `collect`")
    parser.add_argument("--count", type=int, default=40_000, help="queries to make, beside the labelled ones")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    passages = read(options.work / "passages.jsonl", Passage)
    labels = labelled(options.data, options.squad, passages)
    found = labels + made(passages, options.count, random.Random(options.seed), labels)
    write(options.work / "queries.jsonl", found)
    print(f"{len(found)} queries: {dict(collections.Counter(query.kind for query in found))}")
    return 0
