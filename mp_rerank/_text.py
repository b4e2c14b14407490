r"""Foreign text made safe to print: model output, documents, ids and other people's error messages.

A terminal obeys escape sequences, and a log has one entry a line. So control characters are shown as Python writes
them: ``\x1b``, ``\n``. So are the characters that reorder what a reader sees, and lone surrogates, which no stream can
encode. All other text stays as it is.
"""

from __future__ import annotations

import re

__all__ = ["one_line", "printable"]

_UNSAFE = r"\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_NOT_IN_A_LINE = re.compile(rf"[\x00-\x1f{_UNSAFE}]")
_NOT_IN_A_TEXT = re.compile(rf"[\x00-\x08\x0b-\x1f{_UNSAFE}]")  # tabs and newlines are kept


def one_line(text: object) -> str:
    """``str(text)`` for one line of a log, of a terminal or of an error message."""
    return _NOT_IN_A_LINE.sub(_escaped, str(text))


def printable(text: object) -> str:
    """``str(text)`` for several lines, such as a traceback: newlines and tabs are kept."""
    return _NOT_IN_A_TEXT.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()
