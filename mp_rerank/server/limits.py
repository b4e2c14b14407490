"""Bounds on what clients may ask for, each with a refusal that says what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

from mp_rerank._checks import check_count
from mp_rerank.server.refusals import Refused

__all__ = ["Limits", "Places"]


@dataclass(frozen=True)
class Limits:
    """The bounds.

    Attributes:
        body_bytes: of one body.
        documents: of one request.
        characters: of one text.
        requests: at a time, in all.
        connections: at a time.
        requests_per_caller: at a time, of one caller.
        pending_pairs: pairs waiting or being scored, of one model; beyond it requests are refused.
        pending_pairs_per_caller: the same of one caller.
        timeout: seconds a request may take, body included; it may ask for fewer.
        read_timeout: seconds for headers, and again for a body, to come.
        write_timeout: seconds an answer may wait for its reader.
    """

    body_bytes: int = 16 * 2**20
    documents: int = 10_000
    characters: int = 1_000_000
    requests: int = 1024
    connections: int = 4096
    requests_per_caller: int = 256
    pending_pairs: int = 100_000
    pending_pairs_per_caller: int = 50_000
    timeout: int = 600
    read_timeout: int = 30
    write_timeout: int = 30

    def __post_init__(self) -> None:
        for field in fields(self):
            check_count(field.name, getattr(self, field.name))

    def check_texts(self, texts: Sequence[str], documents: int) -> None:
        """Refuse too many documents, and texts that are too long."""
        if documents > self.documents:
            raise Refused("too_many", f"at most {self.documents} documents a request are accepted, not {documents}")
        longest = max(map(len, texts), default=0)
        if longest > self.characters:
            raise Refused("too_many", f"a text may have at most {self.characters} characters, not {longest}")

    def body_too_large(self) -> Refused:
        """The refusal of a body."""
        return Refused("too_large", f"the body: at most {self.body_bytes} bytes are accepted")


class Places:
    """Places for requests: so many in all, and so many for each caller. On one thread.

    Attributes:
        taken: how many are taken now.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.taken = 0
        self._of: Counter[str] = Counter()

    @contextmanager
    def place(self, caller: str) -> Iterator[None]:
        """Take a place and give it back; or refuse."""
        if self.taken >= self._limits.requests:
            raise Refused("overloaded", f"the server has {self.taken} requests, its bound", retry_after=1)
        if self._of[caller] >= self._limits.requests_per_caller:
            words = f"this caller has {self._of[caller]} requests, the bound for one"
            raise Refused("overloaded", words, retry_after=1)
        self.taken += 1
        self._of[caller] += 1
        try:
            yield
        finally:
            self.taken -= 1
            self._of[caller] -= 1
            if not self._of[caller]:
                del self._of[caller]
