"""API keys: from a file or the environment, compared in constant time, never logged."""

from __future__ import annotations

import hashlib
import hmac
import os
from pathlib import Path

__all__ = ["ENVIRONMENT", "Keys"]

ENVIRONMENT = "MP_RERANK_API_KEYS"


class Keys:
    """Who may ask, by key. Holds digests of the keys, and no key.

    Args:
        lines: a key each, with its owner's name before it, or without one; empty lines and comments (``#``) count not.

    Raises:
        ValueError: naming the line, and nothing that is in it.
    """

    def __init__(self, lines: list[str]) -> None:
        self._names: dict[bytes, str] = {}
        for number, line in enumerate(lines, 1):
            words = [] if line.lstrip().startswith("#") else line.split()
            if not words:
                continue
            if len(words) > 2:
                raise ValueError(
                    f"API keys, line {number}: a key, or a name and a key, are needed, not {len(words)} words"
                )
            digest = _digest(words[-1])
            if digest in self._names:
                raise ValueError(f"API keys, line {number}: this key is there already")
            self._names[digest] = words[0] if len(words) == 2 else f"key-{number}"

    def __bool__(self) -> bool:
        return bool(self._names)

    def __repr__(self) -> str:
        return f"<Keys of {', '.join(self._names.values())}>"

    @classmethod
    def read(cls, file: str | os.PathLike[str] | None) -> Keys:
        """The keys in ``file``, or in the variable ``MP_RERANK_API_KEYS`` (separated by commas), or none.

        Raises:
            ValueError: the file cannot be read, or has no key in it; or as the class.
        """
        if file is None:
            return cls(os.environ.get(ENVIRONMENT, "").split(","))
        try:
            found = cls(Path(file).read_text().splitlines())
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--api-key-file: {file} cannot be read: {error}") from error
        if not found:
            raise ValueError(f"--api-key-file: {file} has no key in it, and would let everybody in")
        return found

    def owner(self, given: str) -> str | None:
        """Whose key ``given`` is; ``None``: nobody's. Takes as long for every key."""
        digest = _digest(given)
        owner = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                owner = name
        return owner


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
