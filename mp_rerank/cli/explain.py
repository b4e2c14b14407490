"""``mp-rerank explain``: what an error or a line of the log means, and what to do, from ``troubleshooting.md``."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mp_rerank
from mp_rerank.cli import streams
from mp_rerank.cli.streams import InputError

__all__ = ["DESCRIPTION", "HELP", "Entry", "add_arguments", "call", "entries", "explain"]

HELP = "explain an error, or a line of the log"
DESCRIPTION = "Explain an error or a line of the log: what it means, and what to do."

PAGE = Path(mp_rerank.__file__).with_name("troubleshooting.md")
HEADING = re.compile(r"^### (.+)$", re.MULTILINE)
LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)?([^)]+)\)")
VARIES = "…"  # in a heading: whatever stands there


@dataclass(frozen=True)
class Entry:
    """What is said of one error or message.

    Attributes:
        heading: the error's name, or the message, with ``…`` for what varies.
        text: what it means and what to do, in Markdown.
    """

    heading: str
    text: str

    def describes(self, message: str) -> bool:
        """Whether ``message`` has what the heading says, whatever stands before and after it."""
        parts = (re.escape(part) for part in self.heading.split(VARIES))
        return re.search(".*?".join(parts), message, re.IGNORECASE | re.DOTALL) is not None

    @property
    def precision(self) -> int:
        return len(self.heading.replace(VARIES, ""))


def entries() -> list[Entry]:
    """The entries of the page, in its order."""
    _, *parts = HEADING.split(PAGE.read_text(encoding="utf-8"))
    texts = (re.split(r"^## ", text, maxsplit=1, flags=re.MULTILINE)[0].strip() for text in parts[1::2])
    return [Entry(heading, text) for heading, text in zip(parts[::2], texts, strict=True)]


def explain(words: str) -> list[Entry]:
    """The entries for an error's name, for a message, or for some words of a heading; best first, or none."""
    found = [entry for entry in entries() if entry.describes(words)]
    if found:
        return [max(found, key=lambda entry: entry.precision)]
    wanted = words.lower().split()
    return [entry for entry in entries() if all(word in entry.heading.lower() for word in wanted)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", metavar="WORDS", nargs="*", help="an error's name, or a message; none: list them all")
    parser.set_defaults(verbose=False)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    words = " ".join(arguments.words)
    if not words:
        streams.write("\n".join(entry.heading for entry in entries()))
        return 0
    found = explain(words)
    if not found:
        raise InputError(f"nothing is known of {words!r}; mp-rerank explain lists what is")
    streams.write("\n\n".join(_shown(found)))
    return 0


def _shown(found: list[Entry]) -> Iterator[str]:
    for entry in found:
        yield f"{entry.heading}\n\n{LINK.sub(_shown_link, entry.text)}"


def _shown_link(link: re.Match[str]) -> str:
    return link[1] if link[2].startswith("#") else f"{link[1]} ({link[2]})"
