"""Checks of the arguments that the pool's methods take, in the thread of the caller, before a worker starts.

Each check returns the argument in the form the pool uses, or raises a ``TypeError`` or ``ValueError`` that names it.
"""

from __future__ import annotations

import math
import numbers
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, SupportsIndex, TypedDict

import numpy as np

from mp_rerank._checks import check_optional_count, check_whole, is_for_ever, shown
from mp_rerank._pairs import PLAIN, LongDocuments, Pair, PairOptions, Truncation

__all__ = [
    "MAX_PRIORITY",
    "TEXT_KEY",
    "Document",
    "Documents",
    "OnTimeout",
    "RequestKeywords",
    "RequestOptions",
    "check_caller",
    "check_predict_options",
    "check_top_n",
    "deadline_of",
    "documents_of",
    "items_of",
    "pairs_of",
    "text_of",
]

MAX_PRIORITY = 8
#: where a document that is a dict has its text, as hosted rerankers have it
TEXT_KEY = "text"

OnTimeout = Literal["raise", "partial"]
#: a text, or a dict with a text under `TEXT_KEY`
Document = str | Mapping[str, Any]

# Of CrossEncoder.predict and rank, in all versions since 2: workers batch by tokens and show nothing, and for one score
# a pair, which ranking needs, a softmax changes nothing.
NO_DIFFERENCE = {
    "apply_softmax",
    "batch_size",
    "chunk_size",
    "convert_to_numpy",
    "convert_to_tensor",
    "num_workers",
    "show_progress_bar",
}
# ``activation_fct`` is what ``activation_fn`` was called before version 4.
THE_POOLS_OWN = {"activation_fct", "activation_fn", "device", "pool"}


def text_of(name: str, value: object, index: int | None = None) -> str:
    """``value`` as an exact ``str``: a subclass could bring anything along when it is pickled."""
    if type(value) is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    where = name if index is None else f"{name}[{index}]"
    raise TypeError(f"{where}: a string is needed, not {shown(value)}")


def items_of(name: str, value: object, needed: str) -> list[Any]:
    """``value``, any iterable, as a list of its items, which are not checked here.

    Refused is what would be taken apart in a way that nobody means: a text, a mapping and a table by their names, and a
    set in an order that is another with every run.
    """
    if type(value) is list:
        return list(value)
    why = _refusal(value)
    if why is not None:
        raise TypeError(f"{name}: {needed}, not {shown(value)}{why}")
    if isinstance(value, np.ndarray):
        if value.ndim == 0:
            raise TypeError(f"{name}: {needed}, not {shown(value)}: an array of no dimension holds no sequence")
        items: list[Any] = value.tolist()  # numpy's scalars become Python's
        return items
    try:
        iterator = iter(value)  # type: ignore[call-overload]
    except TypeError:
        raise TypeError(f"{name}: {needed}, not {shown(value)}") from None
    return list(iterator)


def _refusal(value: object) -> str | None:
    """Why ``value``, an iterable, is refused, for the end of a message; ``None``: it is not."""
    if isinstance(value, str):
        return ""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ": decode it first"
    if isinstance(value, Mapping):
        return ": a mapping is gone through by its keys; pass its values()"
    if isinstance(value, (set, frozenset)):
        return ": a set has no order, and results name documents by their place; pass a list"
    if hasattr(type(value), "columns"):  # a frame of pandas or polars, a table of pyarrow
        return ": a table is gone through by its columns; pass one column, or rows as tuples"
    return None


class Documents(NamedTuple):
    """A request's documents.

    Attributes:
        given: each as it is given back: a ``str``, or of the caller's subclass of it.
        texts: each as it is scored: an exact ``str``.
        records: for each the dict that it was in, or ``None``; ``None`` in all: no document was in one.
    """

    given: list[str]
    texts: list[str]
    records: list[Mapping[str, Any] | None] | None = None


def documents_of(documents: Iterable[Document]) -> Documents:
    """``documents``, checked one by one."""
    items = items_of("documents", documents, "a sequence of strings is needed")
    if set(map(type, items)) <= {str}:
        return Documents(items, items)
    given, texts = [], []
    records: list[Mapping[str, Any] | None] = [None] * len(items)
    for i, item in enumerate(items):
        if isinstance(item, Mapping):
            records[i] = item
            item = _text_in(item, i)
        texts.append(text_of("documents", item, i))
        given.append(texts[-1] if isinstance(item, np.str_) else item)
    return Documents(given, texts, None if all(record is None for record in records) else records)


def _text_in(record: Mapping[str, Any], index: int) -> str:
    """The text of a document that is a mapping."""
    try:
        text = record[TEXT_KEY]
    except KeyError:
        keys = ", ".join(repr(key) for key in list(record)[:8]) or "none"
        raise TypeError(f"documents[{index}]: a dict needs its text under {TEXT_KEY!r}; its keys are {keys}") from None
    if not isinstance(text, str):
        raise TypeError(f"documents[{index}][{TEXT_KEY!r}]: a string is needed, not {shown(text)}")
    return text


def pairs_of(pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """``pairs`` as a list of (query, document)."""
    texts = []
    for i, pair in enumerate(items_of("pairs", pairs, "a sequence of (query, document) is needed")):
        if type(pair) is tuple and len(pair) == 2 and type(pair[0]) is str and type(pair[1]) is str:
            texts.append(pair)
            continue
        if isinstance(pair, np.ndarray) and pair.ndim == 1:
            pair = pair.tolist()
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f"pairs[{i}]: a (query, document) is needed, not {shown(pair)}")
        texts.append((text_of("pairs", pair[0], i), text_of("pairs", pair[1], i)))
    return texts


def check_predict_options(**options: object) -> None:
    """Check the options of ``CrossEncoder``'s ``predict`` and ``rank``, of any version, that a pool cannot follow.

    What makes no difference to scores is accepted. What a pool has from its model or its devices must be ``None``.
    """
    for name, value in options.items():
        if name in NO_DIFFERENCE:
            continue
        if name not in THE_POOLS_OWN:
            raise TypeError(f"{name}: no version of CrossEncoder has such an argument")
        if value is not None:
            raise ValueError(
                f"{name}: it is the pool's own, or its model's: RerankerPool(ModelSpec(...), devices=...). With a call "
                f"it must be None, not {shown(value)}"
            )


def check_top_n(top_n: SupportsIndex | None) -> int | None:
    """``top_n`` as an ``int``: it is a number of documents; or ``None``."""
    if top_n is not None:
        check_whole("top_n", top_n, "a whole number or None is needed")
    return check_optional_count("top_n", top_n, 0)


def check_priority(priority: SupportsIndex) -> int:
    """``priority`` as an ``int``: it is a whole number within its range."""
    number = check_whole("priority", priority)
    if abs(number) > MAX_PRIORITY:
        raise ValueError(f"priority: from {-MAX_PRIORITY} to {MAX_PRIORITY} is needed, not {priority}")
    return number


def check_caller(caller: object) -> str:
    """``caller`` as an exact ``str``; it must not be empty."""
    if not isinstance(caller, str):
        raise TypeError(f"caller: a string is needed, not {shown(caller)}")
    if not caller:
        raise ValueError("caller: a string that is not empty is needed, not ''")
    return str.__str__(caller)


def deadline_of(timeout: float | None) -> float | None:
    """When a request with this ``timeout`` expires, on the monotonic clock; ``None``: never."""
    if timeout is None:
        return None
    if not isinstance(timeout, numbers.Real) or isinstance(timeout, bool):
        raise TypeError(f"timeout: seconds or None are needed, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: more than 0 seconds are needed, not {timeout}")
    seconds = timeout if isinstance(timeout, (int, float)) else float(timeout)
    return None if is_for_ever(seconds) else time.monotonic() + seconds


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Check that ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name}: {' or '.join(map(repr, choices))} is needed, not {value!r}")


def check_min_score(score: float | None) -> float | None:
    """``score`` as a ``float`` that is a number; or ``None``."""
    if score is None:
        return None
    if not isinstance(score, numbers.Real) or isinstance(score, bool):
        raise TypeError(f"min_score: a number or None is needed, not {shown(score)}")
    if math.isnan(score):
        raise ValueError("min_score: a number is needed, not nan")
    return float(score)


class RequestKeywords(TypedDict, total=False):
    """`RequestOptions` as keyword arguments, for type checkers and editors."""

    timeout: float | None
    priority: int
    on_timeout: OnTimeout
    caller: str | None
    instruction: str | None
    prompt_name: str | None
    max_tokens_per_doc: int | None
    truncation: Truncation
    long_documents: LongDocuments
    min_score: float | None


@dataclass(frozen=True)
class RequestOptions:
    """What a request may say beside its texts: keyword arguments of ``submit``, ``rerank`` and their kin.

    Attributes:
        timeout: seconds from now until the request expires; what is not scored then is dropped. ``None``: never.
        priority: from -8 to 8; each step doubles the request's share of what its caller gets, and none starves the
            others.
        on_timeout: ``"raise"`` RequestTimeoutError, or ``"partial"``: what is scored by then.
        caller: whose request it is: any string but an empty one. Callers that wait share the workers equally, however
            many requests each has. ``None``: that of the pool or handle which is asked.
        instruction: what to judge by, in words: goes before the query as it is, or into the system turn of a model with
            a chat template, as ``CrossEncoder.predict(prompt=...)`` has it. ``None``: the model's own, if it has one.
        prompt_name: the same, by the name of one of the model's own prompts.
        max_tokens_per_doc: how much of a document may be read, in tokens of the document alone. ``None``: as much as
            fits the model beside the query.
        truncation: what becomes of a document that is longer: its ``"end"`` or its ``"start"`` is cut off, or it is an
            ``"error"``.
        long_documents: what becomes of a document that is too long for the model: ``"truncate"`` it, or ``"chunk"``:
            divide it at ends of sentences, with an overlap, score each chunk, and let the best one count.
        min_score: leave out of a ranking what scores less, and what has no score.
    """

    timeout: float | None = None
    priority: int = 0
    on_timeout: OnTimeout = "raise"
    caller: str | None = None
    instruction: str | None = None
    prompt_name: str | None = None
    max_tokens_per_doc: int | None = None
    truncation: Truncation = "end"
    long_documents: LongDocuments = "truncate"
    min_score: float | None = None

    def __post_init__(self) -> None:
        deadline_of(self.timeout)
        object.__setattr__(self, "priority", check_priority(self.priority))
        if self.caller is not None:
            object.__setattr__(self, "caller", check_caller(self.caller))
        check_choice("on_timeout", self.on_timeout, ("raise", "partial"))
        for name in ("instruction", "prompt_name"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, text_of(name, getattr(self, name)))
        if self.instruction is not None and self.prompt_name is not None:
            raise ValueError("instruction, prompt_name: a request has one of the two")
        limit = self.max_tokens_per_doc
        if limit is not None:
            check_whole("max_tokens_per_doc", limit, "a whole number or None is needed")
        object.__setattr__(self, "max_tokens_per_doc", check_optional_count("max_tokens_per_doc", limit, 1))
        check_choice("truncation", self.truncation, ("end", "start", "error"))
        check_choice("long_documents", self.long_documents, ("truncate", "chunk"))
        object.__setattr__(self, "min_score", check_min_score(self.min_score))

    @classmethod
    def of(cls, keywords: RequestKeywords) -> RequestOptions:
        """The options that ``keywords`` say; an unknown one is a ``TypeError``."""
        if not keywords:
            return _NO_OPTIONS
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(keywords) - set(known))
        if unknown:
            raise TypeError(f"a request has no option {', '.join(unknown)}; it has {', '.join(known)}")
        return cls(**keywords)

    def pair_options(self, prompts: Mapping[str, str]) -> PairOptions:
        """How its pairs are read by a model that has ``prompts``, by their names."""
        if self.prompt_name is not None and self.prompt_name not in prompts:
            raise ValueError(
                f"prompt_name: the model has no prompt {self.prompt_name!r}; it has {', '.join(prompts) or 'none'}"
            )
        prompt = self.instruction if self.prompt_name is None else prompts[self.prompt_name]
        options = PairOptions(prompt, self.max_tokens_per_doc, self.truncation, self.long_documents)
        return PLAIN if options == PLAIN else options


_NO_OPTIONS = RequestOptions()
