"""Prose from documentation: (heading, paragraph) pairs, from files in several formats."""

import ast
import gzip
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

#: what every reader yields
Paragraph = tuple[str, str]

_WORD = re.compile(r"[A-Za-z][A-Za-z'-]*")
_COMMON = frozenset(
    _WORD.findall(
        "the of and to a in is for that it as with be on by this or are an from at which can if not will you has"
    )
)


def is_prose(text: str) -> bool:
    """Whether this reads as English sentences, and not as code, a table or a list of names."""
    words = text.split()
    if not 8 <= len(words) <= 400:
        return False
    plain = sum(bool(_WORD.fullmatch(word.strip(".,;:!?()\"'"))) for word in words)
    common = sum(word.lower() in _COMMON for word in words)
    return plain > 0.75 * len(words) and common > 0.2 * len(words)


def paragraphs(path: Path) -> Iterator[Paragraph]:
    """The file's prose with the heading that each paragraph stands under; nothing for unknown formats."""
    name = path.name.removesuffix(".gz")
    reader = next((reader for pattern, reader in _READERS if re.search(pattern, name)), None)
    if reader is None:
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            raw = file.read(1 << 20)
        for heading, text in reader(raw.decode("utf-8", "ignore")):
            text = " ".join(text.split())
            if is_prose(text):
                yield " ".join(heading.split())[:120], text
    except (OSError, EOFError, SyntaxError, ValueError, RecursionError):
        return


class _Html(HTMLParser):
    _HEADINGS = ("h1", "h2", "h3", "h4")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Paragraph] = []
        self._heading, self._buffer, self._inside = "", [], ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "p" or tag in self._HEADINGS:
            self._inside, self._buffer = tag, []

    def handle_endtag(self, tag: str) -> None:
        if tag != self._inside:
            return
        text = "".join(self._buffer)
        if tag == "p":
            self.found.append((self._heading, text))
        else:
            self._heading = text.strip(" §#\n")
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self._buffer.append(data)


def _html(text: str) -> Iterator[Paragraph]:
    parser = _Html()
    parser.feed(text)
    yield from parser.found


def _roff(text: str) -> Iterator[Paragraph]:
    """Manual pages: enough of the `man` macros to tell headings, paragraphs and running text."""
    heading, lines = "", []
    text = re.sub(r"\\f(?:\w|\(\w\w|\[\w*\])|\\s[-+]?\d|\\[&|^%]|\\\*\([A-Z]{2}", "", text)
    text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    for line in text[text.find(".SH") :].splitlines():
        macro = re.match(r"[.']\s*(\w+)\s*(.*)", line)
        if not macro:
            lines.append(line)
        elif macro[1] in ("B", "I", "BR", "IR", "RB", "RI", "BI", "IB"):
            lines.append(macro[2].replace('"', ""))
        else:
            yield heading, " ".join(lines)
            lines = []
            if macro[1] in ("SH", "SS"):
                heading = macro[2].strip('" ').capitalize()
    yield heading, " ".join(lines)


def _markup(text: str) -> Iterator[Paragraph]:
    """Markdown, reStructuredText, POD and plain text: paragraphs between blank lines, headings by their marks."""
    heading = ""
    for block in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", text, flags=re.S)):
        title = re.match(r"\s*(?:#+|=head\d)\s+(.+)|\s*(\S.*)\n\s*[-=~^*]{3,}\s*$", block)
        if title:
            heading = (title[1] or title[2]).strip()
        elif not re.match(r"\s{4,}|\t|[.=|+]", block):
            yield heading, re.sub(r":\w+:`|[`*_|]|[BCFILSX]<+|>(?=[\s.,;)])", "", block)


def _python(text: str) -> Iterator[Paragraph]:
    """Docstrings; the heading is the name, with its words apart."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef, ast.Module)):
            name = getattr(node, "name", "")
            words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).replace("_", " ").strip()
            for _, paragraph in _markup(ast.get_docstring(node) or ""):
                yield words, paragraph


def _service_model(text: str) -> Iterator[Paragraph]:
    """Descriptions of web services, as JSON with HTML in its `documentation` members."""

    def walk(node: object, name: str) -> Iterator[Paragraph]:
        if isinstance(node, dict):
            if isinstance(node.get("documentation"), str):
                yield re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name), re.sub(r"<[^>]+>", " ", node["documentation"])
            for key, value in node.items():
                yield from walk(value, key)

    yield from walk(json.loads(text), "")


_READERS: list[tuple[str, Callable[[str], Iterator[Paragraph]]]] = [
    (r"\.html?$", _html),
    (r"\.\d[a-z]*$", _roff),
    (r"\.(md|rst|txt|pod|info(-\d+)?)$", _markup),
    (r"\.py$", _python),
    (r"^service-2\.json$", _service_model),
]
