"""report.html in a real browser, which must be installed as `chromium` or under one of its other names."""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from report_runs import whole_run

from ldm.figures.report import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
WIDTHS = (400, 1400)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no chromium")]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, Path]:
    """One run, and two side by side."""
    folder = tmp_path_factory.mktemp("reports")
    runs = [whole_run(folder / f"2023-11-1{day}T00-00-00_{'a_long_name_' * 4}{day}", 1 / day) for day in (4, 5)]
    found = {"one": folder / "one.html", "two": folder / "two.html"}
    write_report(runs[:1], found["one"])
    write_report(runs, found["two"])
    return found


def opened(browser: Any, path: Path, width: int, scheme: str = "light") -> tuple[Any, list[str]]:
    """The page, and what went wrong on it: messages of the console, errors, and requests that leave the page."""
    page, wrong = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme), []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url[:80]}"))
    page.on("request", lambda r: None if r.url.startswith(("data:", path.as_uri())) else wrong.append(r.url))
    page.goto(path.as_uri())
    return page, wrong


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_is_whole(browser, reports, name):
    """Without complaint or network; every picture shows; nothing wider than the window, with all of it unfolded."""
    for width in WIDTHS:
        page, wrong = opened(browser, reports[name], width)
        page.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
        pictures = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth])")
        assert len(pictures) == {"one": 2, "two": 4}[name] and all(done and size > 0 for done, size in pictures)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        charts = page.evaluate(
            "[...document.querySelectorAll('svg[role=img]')].map(s => s.getBoundingClientRect().width)"
        )
        assert len(charts) == 4 and all(250 < size < width for size in charts)
        assert page.evaluate("getComputedStyle(document.querySelector('svg text')).fontSize") == "11.5px"
        assert wrong == []
        page.close()


def test_dark_mode_and_print(browser, reports):
    """Light on dark where that is preferred, in the charts, too; dark on light on paper."""
    seen = {}
    script = """[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,
        getComputedStyle(document.querySelector('svg .line')).stroke]"""
    for scheme in ("light", "dark"):
        page, _ = opened(browser, reports["one"], WIDTHS[0], scheme)
        seen[scheme] = page.evaluate(script)
        page.emulate_media(media="print", color_scheme=scheme)
        seen[f"{scheme} print"] = page.evaluate(script)
        page.close()
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))
    assert brightness(seen["light"][0]) > 200 > 60 > brightness(seen["dark"][0])
    assert brightness(seen["light"][1]) < 60 < 200 < brightness(seen["dark"][1])
    assert seen["light print"] == seen["dark print"] == seen["light"]


def brightness(colour: str) -> float:
    """The mean of `rgb(1, 2, 3)`."""
    numbers = [float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]]
    return sum(numbers) / 3


def test_headings_and_names(browser, reports):
    """Headings without gaps; pictures, charts, tables and scrolling regions have names."""
    for path in reports.values():
        page, _ = opened(browser, path, WIDTHS[1])
        levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => Number(h.tagName[1]))")
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))
        nameless = """[...document.querySelectorAll('img, svg[role=img], table, [role=region]')].filter(found =>
            !(found.alt || found.getAttribute('aria-label') || (found.caption && found.caption.textContent))).length"""
        assert page.evaluate(nameless) == 0
        links = page.evaluate("[...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.hash))")
        assert len(links) >= 6 and all(links)
        page.close()
