"""The page in a real browser (headless Chromium) renders, sorts, filters, fits a phone and works with the keyboard alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from hpc_core.baselines.reading import read_records
from hpc_core.report.entry import entries_of
from hpc_core.report.page import page
from tests.report.many_records import H100, failed, many, measured, with_metric, written

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = "#cases tbody tr:not([hidden]) th"

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all tests. Root may start it only without its sandbox, as in a container."""
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The H100's cases against their baselines: one needs a third more memory, one ran out of it, the others are unchanged."""
    folder = tmp_path_factory.mktemp("report")
    newest = {record.case.id: record for record in measured()}
    newest["llama-3.2-3b/qlora"] = with_metric(newest["llama-3.2-3b/qlora"], "peak_bytes", 1.33)
    newest["llama-3.2-3b/full-fp32"] = failed(newest["llama-3.2-3b/full-fp32"], "tried to allocate <b>20 GiB</b>")
    records = read_records([written(folder / "records", newest.values())]).records
    path = folder / "report.html"
    path.write_text(page(entries_of(records, H100.parent)), encoding="utf-8")
    return path


@pytest.fixture
def complaints() -> list[str]:
    """Messages on the console, errors, and requests other than for the page itself."""
    return []


@pytest.fixture
def tab(browser: Browser, request: pytest.FixtureRequest, complaints: list[str], report: Path) -> Iterator[Page]:
    """A tab that shows the report."""
    context = browser.new_context(**getattr(request, "param", {"viewport": {"width": 1280, "height": 900}}))
    page = context.new_page()
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda sent: None if sent.url.endswith(".html") else complaints.append(sent.url))
    page.goto(report.as_uri())
    yield page
    context.close()


def test_it_renders_without_complaint(tab: Page, complaints: list[str]) -> None:
    """The page has no error and sends no request; worse cases come first with their change, and markup stays text."""
    assert complaints == []
    cards = tab.locator(".card").all_inner_texts()
    assert len(cards) == 2
    assert "<b>20 GiB</b>" in " ".join(cards)
    assert any("peak_bytes +4.41 GiB" in card for card in cards)
    assert tab.locator("#cases tbody tr").count() == len({record.case.id for record in measured()})
    places = tab.locator(".vega").count()
    assert places > 8
    for index in range(places):
        place = tab.locator(".vega").nth(index)
        place.scroll_into_view_if_needed()
        place.locator("canvas").wait_for()
    assert complaints == []


def test_it_sorts_by_each_column(tab: Page) -> None:
    """A heading sorts by number, first downwards and then upwards; cases without a number stay last."""
    peak = "#cases tbody tr td:nth-child(3)"
    head = tab.get_by_role("button", name="peak memory")
    head.click()
    down = [cell.get_attribute("data-v") for cell in tab.locator(peak).all()]
    head.click()
    up = [cell.get_attribute("data-v") for cell in tab.locator(peak).all()]
    assert down[-1] is up[-1] is None  # the case that ran out of memory
    values = [float(each or 0) for each in down[:-1]]
    assert values == sorted(values, reverse=True)
    assert [float(each or 0) for each in up[:-1]] == sorted(values)
    assert tab.locator("#cases th[aria-sort=ascending]").inner_text().strip() == "peak memory"
    assert tab.locator("#cases th[aria-sort=descending]").count() == 0


def test_it_filters_by_words_and_verdict(tab: Page) -> None:
    """Words and a verdict select rows, a minus excludes them, and the page shows the count or that nothing matches."""
    tab.fill("#filter", "qlora -gc -prepare -tuned -nodrop")
    assert [text.split("/")[1] for text in tab.locator(NAMES).all_inner_texts()] == ["qlora", "qlora-dq-b1x2048"]
    assert tab.inner_text("#count").startswith("2 of ")
    tab.select_option("#verdict", "REGRESSED")
    assert tab.locator(NAMES).count() == 1
    tab.fill("#filter", "no such case")
    assert tab.locator("#none").is_visible()
    tab.focus("#filter")
    tab.keyboard.press("Escape")
    tab.select_option("#verdict", "")
    assert tab.locator("#none").is_hidden()
    assert tab.inner_text("#count") == ""


def test_it_needs_no_mouse(tab: Page) -> None:
    """Tab reaches the skip link first, a slash the filter; Enter sorts by a heading and opens a case's details."""
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("/")
    assert tab.evaluate("document.activeElement.id") == "filter"
    tab.get_by_role("button", name="GPU-busy").focus()
    tab.keyboard.press("Enter")
    assert tab.locator("#cases th[aria-sort=descending]").inner_text().strip() == "GPU-busy"
    tab.locator(f"{NAMES} a").first.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_selector("details[open]")
    assert tab.evaluate("document.activeElement.tagName") == "SUMMARY"
    assert tab.locator("details[open] .metrics tbody tr").count() > 10


@pytest.mark.parametrize(
    "tab",
    [
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark", "has_touch": True, "is_mobile": True},
        {"viewport": {"width": 768, "height": 1024}, "color_scheme": "dark"},
        {"viewport": {"width": 1920, "height": 1080}, "color_scheme": "light"},
    ],
    indirect=True,
    ids=["phone", "phone-dark", "tablet-dark", "desktop"],
)
def test_it_fits_every_width_and_theme(tab: Page, complaints: list[str]) -> None:
    """The page never scrolls sideways, its text has enough contrast, and the button changes the theme."""
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    lightness = tab.evaluate(LIGHTNESS, ["body", "backgroundColor"])
    for place in ("body", ".dim", ".verdict.bad", ".verdict.good", ".caption", "#cases a", ".why p", ".why h4"):
        assert _contrast(tab.evaluate(LIGHTNESS, [place, "color"]), tab.evaluate(BACKGROUND, place)) >= 4.5, place
    tab.click("#theme")
    assert (tab.evaluate(LIGHTNESS, ["body", "backgroundColor"]) > 0.5) is not (lightness > 0.5)
    assert complaints == []


_LUMINANCE = """
const luminance = (text) => {
  const parts = text.match(/[0-9.]+/g).map(Number).slice(0, 3)
    .map((c) => c / 255).map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
"""
LIGHTNESS = (
    f"([place, what]) => {{ {_LUMINANCE} return luminance(getComputedStyle(document.querySelector(place))[what]); }}"
)
BACKGROUND = f"""(place) => {{ {_LUMINANCE}
  for (let each = document.querySelector(place); each; each = each.parentElement) {{
    const colour = getComputedStyle(each).backgroundColor;
    if (!colour.endsWith(", 0)")) return luminance(colour);
  }}
  return 1;
}}"""


def _contrast(one: float, other: float) -> float:
    """WCAG 2.2's ratio of two relative luminances. Level AA asks 4.5 of normal text."""
    light, dark = max(one, other), min(one, other)
    return (light + 0.05) / (dark + 0.05)


def test_a_chart_shows_its_values_and_follows_the_theme(tab: Page, complaints: list[str]) -> None:
    """Hovering over a bar shows the case and its value, a click opens its details, and the theme button redraws it."""
    place = tab.locator(".vega").first
    place.scroll_into_view_if_needed()
    place.locator("canvas").wait_for()
    box = place.bounding_box()
    assert box is not None
    before = tab.evaluate("document.querySelector('.vega canvas').toDataURL()")
    tab.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 70)
    tab.wait_for_selector("#vg-tooltip-element.visible")
    assert "GiB" in tab.inner_text("#vg-tooltip-element")
    tab.mouse.click(box["x"] + 0.45 * box["width"], box["y"] + 70)
    tab.wait_for_selector("details[open]")
    tab.click("#theme")
    tab.wait_for_function("before => document.querySelector('.vega canvas').toDataURL() !== before", arg=before)
    assert complaints == []


def test_two_hundred_cases_sort_and_filter(tab: Page, complaints: list[str], tmp_path: Path) -> None:
    """A page of 200 cases loads, sorts and filters without an error."""
    path = tmp_path / "many.html"
    path.write_text(page(entries_of(many(200))), encoding="utf-8")
    tab.goto(path.as_uri())
    tab.get_by_role("button", name="peak memory").click()
    tab.fill("#filter", "qlora")
    assert 0 < tab.locator(NAMES).count() < 200
    assert complaints == []
