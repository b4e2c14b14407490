"""Checks of single values, for whatever takes options: each raises a ``TypeError`` or ``ValueError`` that names it.

Numbers come back as Python's own: a whole number may be of any type that says it is one (``operator.index``), such as
numpy's. Types are checked too. A word is truthy: ``"false"`` in place of ``False`` would switch on what it is to
switch off.
"""

from __future__ import annotations

import numbers
import operator
import re
import threading
from typing import Any

__all__ = [
    "check_count",
    "check_flag",
    "check_optional_count",
    "check_seconds",
    "check_text",
    "check_whole",
    "is_for_ever",
    "memory_size",
    "shown",
]

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b", re.IGNORECASE)


def check_flag(name: str, value: object) -> None:
    """``value`` is ``True`` or ``False``, and no word or number in place of it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False is needed, not {value!r}")


def check_whole(name: str, value: Any, needed: str = "a whole number is needed") -> int:
    """``value`` as an ``int``: it is a whole number of any type, and no bool."""
    if type(value) is int:
        return value
    if "bool" not in f"{type(value).__name__} {getattr(value, 'dtype', '')}":
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name}: {needed}, not {value!r}")


def check_count(name: str, value: Any, least: int = 1) -> int:
    """``value`` as an ``int``: it is a whole number, and at least ``least``."""
    count = check_whole(name, value)
    if count < least:
        raise ValueError(f"{name}: at least {least} is needed, not {value}")
    return count


def check_optional_count(name: str, value: Any, least: int = 1) -> int | None:
    """As ``check_count``, or ``None``."""
    return None if value is None else check_count(name, value, least)


def check_seconds(name: str, value: Any, needed: str = "seconds are needed") -> float:
    """``value`` as Python's own number: it is one of seconds, of any real type, and not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: {needed}, not {value!r}")
    seconds = value if isinstance(value, (int, float)) else float(value)
    if not seconds >= 0:
        raise ValueError(f"{name}: at least 0 seconds are needed, not {value}")
    return seconds


def memory_size(name: str, value: Any) -> int:
    """``value`` in bytes: a whole number of them, or a text such as ``"8GiB"`` (2**30 each) or ``"512MB"`` (10**6)."""
    if not isinstance(value, str):
        return check_count(name, value)
    found = SIZE.fullmatch(value.strip())
    if found is None:
        raise ValueError(f"{name}: bytes, or a size such as '8GiB' or '512MB', are needed, not {value!r}")
    number, prefix, binary = found.groups()
    if binary and not prefix:
        raise ValueError(f"{name}: bytes, or a size such as '8GiB' or '512MB', are needed, not {value!r}")
    unit = (1024 if binary else 1000) ** " kmgt".index(prefix.lower() or " ")
    return check_count(name, int(float(number) * unit))


def check_text(name: str, value: object) -> None:
    """``value`` is a string with something in it."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: a string is needed, not {value!r}")
    if not value:
        raise ValueError(f"{name}: it is empty")


def is_for_ever(seconds: float) -> bool:
    """Whether no clock of the system can wait so long (about 300 years): infinity, and whole numbers beyond floats."""
    return seconds > threading.TIMEOUT_MAX


def shown(value: object) -> str:
    """``value`` for an error message: its type and the beginning of its ``repr``."""
    text = repr(value)
    if "\n" in text:  # of a table, say
        text = " ".join(text.split())
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
