"""Check the built site: ``python .ci/check_site.py FOLDER``.

Its pages load nothing from elsewhere (styles, scripts, fonts, images), and every link within it, with its anchor, leads
to something that is there.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# What a browser fetches without being asked. A link that a reader may follow is not that.
LOADED = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src"), ("use", "href")}
OUTSIDE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
STYLE_URL = re.compile(r"(?:@import\s+|url\()\s*[\"']?([^\"')]+)")


class Page(HTMLParser):
    """One page's anchors, links and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.loaded: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if (tag, name) in LOADED and value:
                self.loaded.add(value)
            if (tag, name) == ("a", "href") and value:
                self.links.add(value)


def faults(folder: Path) -> list[str]:
    """What is loaded from elsewhere, and what leads nowhere."""
    pages = {path.resolve(): Page(path.read_text()) for path in folder.rglob("*.html")}
    found = []
    for path, page in pages.items():
        where = path.relative_to(folder.resolve())
        found += [f"{where}: loads {url}" for url in page.loaded if OUTSIDE.match(url)]
        for link in page.links | page.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc or link == "#":
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.exists():
                found.append(f"{where}: {link} leads nowhere")
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].anchors:
                found.append(f"{where}: {link}: the page has no such anchor")
    for path in folder.rglob("*.css"):
        urls = STYLE_URL.findall(path.read_text())
        found += [f"{path.relative_to(folder)}: loads {url}" for url in urls if OUTSIDE.match(url)]
    return sorted(found)


if __name__ == "__main__":
    if found := faults(Path(sys.argv[1])):
        sys.exit("\n".join(found))
