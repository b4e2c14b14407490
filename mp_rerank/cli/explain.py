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
MESSAGES = re.compile(r"(?:- `[^`\n]+`\n)*")  # below a heading that is a name: the messages that it is for
LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)?([^)]+)\)")
VARIES = "…"  # in a message: whatever stands there
NAMED = re.compile(r"mp-rerank explain ([\w-]+)")  # the end of a message


@dataclass(frozen=True)
class Entry:
    """What is said of one error or warning.

    Attributes:
        name: what a message calls it: an error's class, or words joined by hyphens. Where no message of this package
            does, the message or the symptom itself.
        messages: as they are logged, with ``…`` for what varies.
        text: what it means and what to do, in Markdown.
    """

    name: str
    messages: tuple[str, ...]
    text: str

    def precision(self, message: str) -> int:
        """How many characters of ``message`` are those that the entry describes; 0 where it is about something else."""
        return max(
            (len(said.replace(VARIES, "")) for said in (self.name, *self.messages) if _says(said, message)), default=0
        )


def _says(pattern: str, message: str) -> bool:
    parts = (re.escape(part) for part in pattern.split(VARIES))
    return re.search(".*?".join(parts), message, re.IGNORECASE | re.DOTALL) is not None


def entries() -> list[Entry]:
    """The entries of the page, in its order."""
    _, *parts = HEADING.split(PAGE.read_text(encoding="utf-8"))
    return [_entry(name, text) for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _entry(name: str, below: str) -> Entry:
    text = re.split(r"^## ", below, maxsplit=1, flags=re.MULTILINE)[0].strip()
    found = MESSAGES.match(text)
    assert found is not None
    messages = tuple(line[3:-1] for line in found[0].splitlines())
    return Entry(name, messages, text[found.end() :].strip())


def explain(words: str) -> list[Entry]:
    """The entries for a name, for a message, or for some words of either; best first, or none."""
    known = entries()
    named = {words, *NAMED.findall(words)}
    if found := [entry for entry in known if entry.name in named]:
        return found
    best = max(known, key=lambda entry: entry.precision(words))
    if best.precision(words):
        return [best]
    wanted = words.lower().split()
    return [entry for entry in known if all(word in " ".join([entry.name, *entry.messages]).lower() for word in wanted)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what the command takes."""
    parser.add_argument("words", metavar="WORDS", nargs="*", help="an error's name, or a message; none: list them all")
    parser.set_defaults(verbose=False)


def call(arguments: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    words = " ".join(arguments.words)
    if not words:
        streams.write("\n".join(_heading(entry) for entry in entries()))
        return 0
    found = explain(words)
    if not found:
        raise InputError(f"nothing is known of {words!r}; mp-rerank explain lists what is")
    streams.write("\n\n".join(_shown(found)))
    return 0


def _heading(entry: Entry) -> str:
    return "\n    ".join([entry.name, *entry.messages])


def _shown(found: list[Entry]) -> Iterator[str]:
    for entry in found:
        yield f"{_heading(entry)}\n\n{LINK.sub(_shown_link, entry.text)}"


def _shown_link(link: re.Match[str]) -> str:
    return link[1] if link[2].startswith("#") else f"{link[1]} ({link[2]})"
