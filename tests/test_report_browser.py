"""The HTML report in a real browser: charts drawn, nothing asked of a network, no complaint, phone, print, dark."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from qfarm.report.html import to_html
from qfarm.report.tables import load
from tests.browser import Browser, chromium
from tests.report_example import FAILED, Planted, attempt_row, hostile_store
from tests.test_report_html import planted

pytestmark = pytest.mark.slow
PHONE, DESKTOP = 390, 1280
WHITE, BLACK = "rgb(255, 255, 255)", "rgb(0, 0, 0)"
EVIL = "</script><script>document.title='PWNED'</script><img src=x onerror=\"document.title='PWNED'\">"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        started.driver.get("about:blank")
        started.requests()  # what the browser asks for itself when it starts
        yield started


def written(path: Path, store: object) -> Path:
    path.write_text(to_html(load(store), store, written="2026-11-27T12:00:00+00:00"))
    return path


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_charts_are_drawn_within_the_page(browser: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    path = written(tmp_path / "page.html", planted().store)
    browser.open(path, width, dark=dark)
    assert browser.console() == []
    assert browser.requests() == [path.as_uri()]
    assert browser.run("return document.documentElement.scrollWidth") == width
    empty = (
        "return [...document.querySelectorAll('[data-chart]')].filter(c => !c.querySelector('svg [aria-label]')).length"
    )
    assert browser.run("return document.querySelectorAll('[data-chart] svg').length") >= 3
    assert browser.run(empty) == 0
    # Marks take their colours from the page, so both schemes and paper have their own.
    script = "return getComputedStyle(document.querySelector('[aria-label*=\"; front\"]')).fill"
    assert browser.run(script) == ("rgb(86, 180, 233)" if dark else "rgb(0, 114, 178)")
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_foreign_text_does_nothing(browser: Browser, tmp_path: Path) -> None:
    store = hostile_store()
    store.rows["cells"] = [
        dataclasses.replace(cell, model=EVIL, recipe=EVIL + cell.recipe) for cell in store.rows["cells"]
    ]
    store.rows["attempts"][3] = attempt_row(FAILED, outcome=EVIL, stage=EVIL, error=EVIL, traceback=EVIL, job="job")
    browser.open(written(tmp_path / "page.html", store), DESKTOP)
    hover = (
        "for (const m of document.querySelectorAll('svg [aria-label]')) for (const kind of ['mouseover', 'mousemove'])"
    )
    browser.run(hover + " m.dispatchEvent(new MouseEvent(kind, {bubbles: true, clientX: 9, clientY: 9}))")
    assert browser.run("return document.querySelectorAll('img').length") == 0
    assert browser.run("return document.title") == "job, tiny - qfarm report"
    assert browser.console() == [] and len(browser.requests()) == 1


def test_paper_is_white_and_shows_whole_tables(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path / "page.html", planted().store), DESKTOP, dark=True, media="print")
    colours = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
    assert browser.run(colours) == [WHITE, BLACK]
    assert browser.run("return getComputedStyle(document.querySelector('.scrolls')).overflowX") == "visible"
    assert browser.run("return getComputedStyle(document.querySelector('nav')).display") == "none"


def test_rows_sort_by_their_numbers(browser: Browser, tmp_path: Path) -> None:
    browser.open(written(tmp_path / "page.html", planted().store), DESKTOP)
    column = "const h = [...document.querySelectorAll('.sortable th')].find(h => h.textContent == 'PPL'); "
    values = "return [...h.closest('table').tBodies[0].rows].map(r => Number(r.cells[h.cellIndex].textContent))"
    browser.run(column + "h.querySelector('button').click()")
    rising = browser.run(column + values)
    assert rising == sorted(rising) and len(rising) == 10
    browser.run(column + "h.querySelector('button').click()")
    assert browser.run(column + values) == rising[::-1]
    assert browser.run(column + "return h.getAttribute('aria-sort')") == "descending"


def test_five_hundred_cells(browser: Browser, tmp_path: Path) -> None:
    made = Planted(windows=50)
    for index in range(500):
        difference, bits = made.noise(0.02) + 0.001 * index, 3 + index % 20 / 4
        made.cell(f"{index:04}", f"method{index % 25}", difference, linear_bits=bits)
    browser.open(written(tmp_path / "page.html", made.store), DESKTOP)
    seconds = browser.run("return performance.now() / 1000")
    print(f"500 cells: {(tmp_path / 'page.html').stat().st_size:,} bytes, drawn {seconds:.2f} s after navigation")
    assert browser.run("return document.querySelectorAll('.sortable tbody tr').length") == 501
    assert browser.run("return document.querySelectorAll('.sortable').length") == 1
    assert browser.console() == []
    # Only points on the front can be reached by the tab key where there are many.
    stops = browser.run(
        "return [...document.querySelectorAll('svg [tabindex]')].map(m => m.getAttribute('aria-label'))"
    )
    assert stops and all(stop.endswith("; front") or "%" in stop for stop in stops)
