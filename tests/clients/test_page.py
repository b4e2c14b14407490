"""The page, in a real browser: headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE
from fakes import score_of
from serving import ServerProcess, server_process

if os.environ.get("MP_RERANK_CLIENTS") == "required":
    from playwright import sync_api
else:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
KEY = "a-key"
QUERY = "how do birds fly?"
DOCUMENTS = ["Bread is baked.", "Wings <b>give</b> lift.", "Water is wet."]

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(f"browser {KEY}\n")
    with server_process(keys=str(keys)) as server:
        server.wait_for("(ready)")
        yield server


@pytest.fixture(params=["light", "dark"])
def page(request: pytest.FixtureRequest, browser: Any, server: ServerProcess) -> Iterator[Any]:
    """The page, opened by somebody who knows the key; whatever the browser complains of is a failure."""
    context = browser.new_context(color_scheme=request.param, viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    complaints: list[str] = []
    elsewhere: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
    page.on("request", lambda asked: None if asked.url.startswith(server.url) else elsewhere.append(asked.url))
    page.goto(server.url)
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    page.locator("#state-text", has_text="ready").wait_for()
    yield page
    if folder := os.environ.get("MP_RERANK_SCREENSHOTS"):
        page.screenshot(path=str(Path(folder) / f"page-{request.param}.png"), full_page=True)
    context.close()
    assert [words for words in complaints if "Failed to load resource" not in words] == []
    assert [url for url in elsewhere if not url.startswith("data:")] == []


def test_a_query_with_the_keyboard_alone(page: Any) -> None:
    page.get_by_label("Query", exact=True).focus()
    page.keyboard.press("Control+A")
    page.keyboard.type(QUERY)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.insert_text("\n".join(DOCUMENTS))
    page.keyboard.press("Control+Enter")
    page.get_by_text("3 documents in").wait_for()
    order = sorted(DOCUMENTS, key=lambda document: -score_of(QUERY, document))
    assert page.locator("#results .bar span").all_inner_texts() == order  # as text, not as HTML
    shown = [float(score) for score in page.locator("#results .score").all_inner_texts()]
    assert shown == sorted(shown, reverse=True)
    widths = page.locator("#results rect").evaluate_all(
        "bars => bars.map(bar => parseFloat(bar.getAttribute('width')))"
    )
    assert widths == pytest.approx([score * 100 for score in shown], abs=0.01)
    page.locator("#callers").get_by_text("key:browser").wait_for()
    page.wait_for_function("document.getElementById('p50').textContent.includes('ms')")


def test_an_error_is_shown_in_words(page: Any) -> None:
    page.locator("#documents").fill("!raise too odd")
    page.get_by_role("button", name="Rank").click()
    page.get_by_text("too odd").wait_for()
    assert page.locator("#results li").count() == 0


def test_a_worker_that_dies_is_seen(browser: Any, tmp_path: Path) -> None:
    with server_process() as server:
        server.wait_for("(ready)")
        page = browser.new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(server.url)
        page.locator("#state-text", has_text="ready").wait_for()
        assert page.locator("#workers tr").count() == 2
        page.locator("#documents").fill(f"!once {tmp_path / 'mark'} !signal SIGKILL")
        page.get_by_role("button", name="Rank").click()
        page.locator("#workers", has_text="crashed SIGKILL").wait_for()
        page.get_by_text("1 document in").wait_for()  # scored by the other
        page.close()
        server.process.terminate()
        server.end()


def test_a_narrow_screen_scrolls_in_its_tables_only(page: Any) -> None:
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_server_that_is_gone_is_said(browser: Any) -> None:
    with server_process() as server:
        server.wait_for("(ready)")
        page = browser.new_page()
        page.goto(server.url)
        page.locator("#state-text", has_text="ready").wait_for()
        server.process.terminate()
        page.get_by_text("the server cannot be reached").wait_for(timeout=PATIENCE * 1000)
        server.end()
        page.close()
