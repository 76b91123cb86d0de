"""The committed reports in a real browser, as on a phone and on a desk: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

REPORTS = Path(__file__).resolve().parents[2] / "benchmarks" / "reports"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
WIDTHS_PX = (360, 1280)
SMALLEST_TEXT_PX = 9.0

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here: apt install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not here: make test-browser")
    with playwright.sync_playwright() as here:
        opened = here.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.mark.parametrize("width_px", WIDTHS_PX)
@pytest.mark.parametrize("path", sorted(REPORTS.glob("*.html")), ids=lambda path: path.stem)
def test_a_report_can_be_read(browser: Any, path: Path, width_px: int) -> None:
    page = browser.new_page(viewport={"width": width_px, "height": 800})
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    assert said == [] and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width_px, "the page scrolls sideways"
    charts = page.locator("svg").all()
    assert charts and all((chart.bounding_box() or {"width": 0})["width"] > 100 for chart in charts)
    smallest_px = page.evaluate(
        "Math.min(...[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().height))"
    )
    assert smallest_px >= SMALLEST_TEXT_PX
    page.close()
