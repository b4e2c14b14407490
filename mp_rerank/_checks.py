"""Checks of single values, for whatever takes options: each raises a ``TypeError`` or ``ValueError`` that names it.

Types are checked too. A word is truthy: ``"false"`` in place of ``False`` would switch on what it is to switch off.
"""

from __future__ import annotations

import threading

__all__ = ["check_count", "check_flag", "check_optional_count", "check_seconds", "check_text", "is_for_ever", "shown"]


def check_flag(name: str, value: object) -> None:
    """``value`` is ``True`` or ``False``, and no word or number in place of it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: True or False is needed, not {value!r}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """``value`` is a whole number, and at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: a whole number is needed, not {value!r}")
    if value < least:
        raise ValueError(f"{name}: at least {least} is needed, not {value}")


def check_optional_count(name: str, value: object, least: int = 1) -> None:
    """As ``check_count``, or ``None``."""
    if value is not None:
        check_count(name, value, least)


def check_seconds(name: str, value: object) -> None:
    """``value`` is a number of seconds, and not negative."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}: seconds are needed, not {value!r}")
    if not value >= 0:
        raise ValueError(f"{name}: at least 0 seconds are needed, not {value}")


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
    return f"{type(value).__name__} {text[:60]}{'…' if len(text) > 60 else ''}"
