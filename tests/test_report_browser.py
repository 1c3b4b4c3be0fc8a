"""The page of a report in a real browser: it fits, asks for nothing, complains of nothing, and its controls work."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import CHROMIUM, Page, browser
from reports import HOSTILE, example

from molora.reports import html_page
from molora.reports.data import Report

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser for all tests here."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def wide(experts: int = 16) -> Report:
    """A report with names and heatmaps much wider than a phone."""
    return example("a_long_name_without_any_place_to_break_" * 4, experts)


def opened(page: Page, report: Report, folder: Path, width: int, dark: bool = False) -> None:
    (folder / "report.html").write_text(html_page(report), encoding="utf-8")
    page.open((folder / "report.html").as_uri(), width, dark)


@needs_chromium
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_fits_its_window_asks_for_nothing_and_complains_of_nothing(
    width: int, dark: bool, page: Page, tmp_path: Path
) -> None:
    opened(page, wide(), tmp_path, width, dark)
    page.ask("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    sizes = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scrolls, window = page.ask(sizes)
    assert scrolls <= window
    assert page.requests == []
    assert page.complaints == []
    background = page.ask("getComputedStyle(document.body).backgroundColor")
    red = int(re.findall(r"\d+", background)[0])
    assert (red < 60) if dark else (red > 200)
    assert page.colours_of(page.screenshot()) > 50


@needs_chromium
def test_an_empty_picture_would_be_noticed_and_so_would_a_page_that_is_too_wide(page: Page, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<div style='width:900px'>x</div><script>console.error('bad')</script><img src='http://127.0.0.1:9/x.png'>"
    )
    page.open((tmp_path / "bad.html").as_uri(), 380)
    assert page.ask("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert any("bad" in one for one in page.complaints)
    assert page.requests == ["http://127.0.0.1:9/x.png"]
    page.open("about:blank", 380)
    assert page.colours_of(page.screenshot()) == 1


@needs_chromium
def test_controls_change_what_is_shown_and_back(page: Page, tmp_path: Path) -> None:
    opened(page, example(), tmp_path, 1280)
    state = (
        "JSON.stringify([...document.querySelectorAll('svg[data-matrix] .cell, svg[data-small] .cell')].map((one) => "
        "[one.className.baseVal, Number(one.getAttribute('fill-opacity')).toFixed(2)]))"
    )
    numbers = "[...document.querySelectorAll('svg[data-matrix] .in-cell')].map((one) => one.textContent).join()"
    before = page.ask(state), page.ask(numbers)
    change = (
        "for (const one of document.querySelectorAll('select[data-for]')) {{ "
        "one.selectedIndex = {} * (one.options.length - 1); one.dispatchEvent(new Event('change')); }} "
        "const slider = document.getElementById('step'); "
        "slider.value = {}; slider.dispatchEvent(new Event('input'));"
    )
    page.ask("{" + change.format(1, 0) + "}")
    assert page.ask(numbers) != before[1]
    assert page.ask("document.getElementById('step-said').textContent") == "step 5, while training"
    page.ask("{" + change.format(0, 3) + "}")
    assert (page.ask(state), page.ask(numbers)) == before, "page.js and heat.py say the same"
    assert page.complaints == []


@needs_chromium
def test_tokens_are_reached_by_keyboard_and_tell_their_weights(page: Page, tmp_path: Path) -> None:
    opened(page, example(), tmp_path, 380)
    panel = "document.getElementById('token-panel').textContent"
    assert "Token 1 of 4" in page.ask(panel)
    assert page.ask("document.querySelectorAll('.token[tabindex=\"0\"]').length") == 1
    page.ask("document.querySelector('.token').focus()")
    for key in ("ArrowRight", "ArrowRight"):
        page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
    assert "Token 3 of 4: “ld\n”" in page.ask(panel)
    assert "70 %" in page.ask(panel)
    page.ask(
        "{ const one = document.getElementById('token-group'); one.selectedIndex = 1; "
        "one.dispatchEvent(new Event('change')); }"
    )
    assert "layer 0" in page.ask(panel)
    assert "25 %" in page.ask(panel)
    page.call("Input.dispatchKeyEvent", type="keyDown", key="End")
    assert "Token 4 of 4" in page.ask(panel)


@needs_chromium
def test_text_from_data_runs_nothing_in_the_browser(page: Page, tmp_path: Path) -> None:
    opened(page, example(HOSTILE), tmp_path, 380)
    assert page.complaints == []
    assert page.ask("document.querySelectorAll('img').length") == 0
