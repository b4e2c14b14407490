"""What is checked of the built site (`tox run -e docs`): the checks find what they are for."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / ".ci" / "check_site.py"


def faults(folder: Path) -> list[str]:
    spec = importlib.util.spec_from_file_location("check_site", CHECK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.faults(folder)


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ('<a href="other.html#there">', []),
        ('<a href="https://example.org/">', []),
        ('<a href="gone.html">', ["page.html: gone.html leads nowhere"]),
        ('<a href="other.html#gone">', ["page.html: other.html#gone: the page has no such anchor"]),
        ('<script src="https://example.org/x.js">', ["page.html: loads https://example.org/x.js"]),
        ('<link rel="stylesheet" href="//example.org/x.css">', ["page.html: loads //example.org/x.css"]),
        ('<img src="gone.png">', ["page.html: gone.png leads nowhere"]),
    ],
)
def test_a_page_is_looked_through(body: str, found: list[str], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(body)
    (tmp_path / "other.html").write_text('<p id="there">')
    assert faults(tmp_path) == found


def test_a_style_that_fetches_a_font_is_found(tmp_path: Path) -> None:
    (tmp_path / "style.css").write_text("@font-face { src: url('https://example.org/font.woff2') }")
    assert faults(tmp_path) == ["style.css: loads https://example.org/font.woff2"]
