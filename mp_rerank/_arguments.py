"""Checks of the arguments that the pool's methods take, in the thread of the caller, before a worker starts.

Each check returns the argument in the form the pool uses, or raises a ``TypeError`` or ``ValueError`` that names it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Literal, SupportsIndex, TypedDict

from mp_rerank._checks import check_optional_count, is_for_ever, shown
from mp_rerank._pairs import Pair

__all__ = [
    "MAX_PRIORITY",
    "OnTimeout",
    "RequestKeywords",
    "RequestOptions",
    "check_caller",
    "check_predict_options",
    "check_top_n",
    "deadline_of",
    "documents_of",
    "pairs_of",
    "text_of",
]

MAX_PRIORITY = 8

OnTimeout = Literal["raise", "partial"]

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
THE_POOLS_OWN = {"activation_fct", "activation_fn", "device", "pool", "prompt", "prompt_name"}


def text_of(name: str, value: object, index: int | None = None) -> str:
    """``value`` as an exact ``str``: a subclass could bring anything along when it is pickled."""
    if type(value) is str:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    where = name if index is None else f"{name}[{index}]"
    raise TypeError(f"{where}: a string is needed, not {shown(value)}")


def documents_of(documents: Iterable[str]) -> list[str]:
    """``documents`` as a list; its items are not checked here."""
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Iterable):
        raise TypeError(f"documents: a sequence of strings is needed, not {shown(documents)}")
    return list(documents)


def pairs_of(pairs: Iterable[Sequence[str]]) -> list[Pair]:
    """``pairs`` as a list of (query, document)."""
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise TypeError(f"pairs: a sequence of (query, document) is needed, not {shown(pairs)}")
    texts = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
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


def check_top_n(top_n: int | None) -> None:
    """Check that ``top_n`` is a number of documents, or ``None``."""
    if top_n is not None and (not isinstance(top_n, int) or isinstance(top_n, bool)):
        raise TypeError(f"top_n: a whole number or None is needed, not {top_n!r}")
    check_optional_count("top_n", top_n, 0)


def check_priority(priority: SupportsIndex) -> None:
    """Check that ``priority`` is a whole number within its range."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise TypeError(f"priority: a whole number is needed, not {priority!r}")
    if abs(priority) > MAX_PRIORITY:
        raise ValueError(f"priority: from {-MAX_PRIORITY} to {MAX_PRIORITY} is needed, not {priority}")


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
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout: seconds or None are needed, not {timeout!r}")
    if not timeout > 0:
        raise ValueError(f"timeout: more than 0 seconds are needed, not {timeout}")
    return None if is_for_ever(timeout) else time.monotonic() + timeout


class RequestKeywords(TypedDict, total=False):
    """`RequestOptions` as keyword arguments, for type checkers and editors."""

    timeout: float | None
    priority: int
    on_timeout: OnTimeout
    caller: str | None


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
    """

    timeout: float | None = None
    priority: int = 0
    on_timeout: OnTimeout = "raise"
    caller: str | None = None

    def __post_init__(self) -> None:
        deadline_of(self.timeout)
        check_priority(self.priority)
        if self.caller is not None:
            object.__setattr__(self, "caller", check_caller(self.caller))
        if self.on_timeout not in ("raise", "partial"):
            raise ValueError(f"on_timeout: 'raise' or 'partial' is needed, not {self.on_timeout!r}")

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


_NO_OPTIONS = RequestOptions()
