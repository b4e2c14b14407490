"""Sphinx: the repository's own links, and its code in docstrings.

- The lists of links in ``docs/index.md`` are the table of contents: a heading is a caption, its links are the pages.
- A link to a file or a folder that is no page leads to one made of it: the source, or the list of what is in it.
- An indented block of a docstring is code, and a public name in double backticks is a link.
"""

from __future__ import annotations

import ast
import html
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx

import mp_rerank

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\.(?:md|rst)\)")
PUBLIC_NAME = re.compile(rf"``({'|'.join(mp_rerank.__all__)})``")
SECTION = re.compile(r"\w+:\s*$")


def add_contents(app: Sphinx, docname: str, content: list[str]) -> None:
    """Add hidden tables of contents to the front page, made of its lists."""
    if docname != app.config.root_doc:
        return
    text = content[0]
    _, *parts = HEADING.split(text)
    for caption, body in zip(parts[::2], parts[1::2], strict=True):
        pages = "\n".join(dict.fromkeys(LINK.findall(body)))
        text += f"\n\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}\n```\n"
    content[0] = text


def lead_to_sources(app: Sphinx, doctree: nodes.document) -> None:
    """Let links to what is in the repository, and is no page, lead to a page that is made of it."""
    docname = app.env.docname
    root = Path(app.srcdir)
    found = [
        *doctree.findall(addnodes.download_reference),
        *(node for node in doctree.findall(addnodes.pending_xref) if node["reftype"] == "myst"),
    ]
    for node in found:
        target = node["reftarget"].partition("#")[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(docname), target))
        if node.get("refdomain") == "doc":
            path = f"{target}.md"  # how MyST names a page, and whatever else ends so
        if not target or path.partition(".")[0] in app.env.found_docs or not (root / path).exists():
            continue  # a page, or nothing: Sphinx says so
        if path.endswith(".png"):
            continue  # Sphinx copies it
        app.env.repository_sources.setdefault(docname, set()).add(path)  # type: ignore[attr-defined]
        uri = app.builder.get_relative_uri(docname, page_of(path))
        node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def page_of(path: str) -> str:
    return f"source/{path}"


def source_pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """The pages that links lead to: files with their lines, folders with their files; and the site's front door."""
    root = Path(app.srcdir)
    paths = set().union(*app.env.repository_sources.values())  # type: ignore[attr-defined]
    for folder in [path for path in paths if (root / path).is_dir()]:
        paths |= {f"{folder}/{name}" for name in files_of(root / folder)}
    for path in sorted(paths):
        page = page_of(path)
        body = listed(app, path, page) if (root / path).is_dir() else highlighted(app, root / path)
        yield page, {"title": path, "body": f"<h1>{html.escape(path)}</h1>\n{body}"}, "page.html"
    front = app.builder.get_relative_uri("index", app.config.root_doc)
    yield (
        "index",
        {
            "title": "mp_rerank",
            "body": f'<p><a href="{front}">The documentation</a></p>',
            "metatags": f'<meta http-equiv="refresh" content="0; url={front}">',
        },
        "page.html",
    )


def files_of(folder: Path) -> list[str]:
    """The files of a folder that can be read."""
    return sorted(path.name for path in folder.iterdir() if path.suffix in {".md", ".py", ".txt", ".toml"})


def listed(app: Sphinx, path: str, page: str) -> str:
    items = [
        f'<li><a href="{app.builder.get_relative_uri(page, page_of(f"{path}/{name}"))}">{html.escape(name)}</a></li>'
        for name in files_of(Path(app.srcdir, path))
    ]
    return f"<ul>{''.join(items)}</ul>"


def highlighted(app: Sphinx, path: Path) -> str:
    text = path.read_text()
    language = {".py": "python", ".toml": "toml", ".md": "markdown", "": "bash"}.get(path.suffix, "text")
    try:
        block: str = app.builder.highlighter.highlight_block(text, language, linenos="inline")  # type: ignore[attr-defined]
    except ClassNotFound:
        block = f"<pre>{html.escape(text)}</pre>"
    return block


def mark_up(app: Sphinx, what: str, name: str, found: object, options: object, lines: list[str]) -> None:
    """Make links of public names, and a code block of each indented block that follows a paragraph."""
    made: list[str] = []
    rest = [PUBLIC_NAME.sub(r":py:obj:`~mp_rerank.\1`", line) for line in lines]
    in_section = False
    while rest:
        line = rest.pop(0)
        if line and not line.startswith(" "):
            in_section = bool(SECTION.fullmatch(line))  # Args:, Raises:
        elif line and not in_section and len(made) > 1 and not made[-1]:
            block = [line]
            while rest and (not rest[0].strip() or rest[0].startswith(" ")):
                block.append(rest.pop(0))
            made += [f".. code-block:: {'python' if is_python(block) else 'text'}", "", *block, ""]
            continue
        made.append(line)
    lines[:] = made


def is_python(block: list[str]) -> bool:
    try:
        ast.parse(textwrap.dedent("\n".join(block)))
    except SyntaxError:
        return False
    return True


def forget(app: Sphinx, env: Any, docname: str) -> None:
    env.repository_sources.pop(docname, None)


def prepare(app: Sphinx) -> None:
    if not hasattr(app.env, "repository_sources"):
        app.env.repository_sources = {}  # type: ignore[attr-defined]


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("builder-inited", prepare)
    app.connect("source-read", add_contents)
    app.connect("doctree-read", lead_to_sources, priority=100)  # before what is downloaded is collected
    app.connect("env-purge-doc", forget)
    app.connect("html-collect-pages", source_pages)
    app.connect("autodoc-process-docstring", mark_up, priority=100)  # before napoleon
    return {"parallel_read_safe": False}
