"""The report in a real browser: what a reader can do with it, and that it needs nothing but its one file."""

import pytest
from browser import Page, find_chromium
from test_results_collect import fail, finish, plan, sweep

from dsam.results.report import make as report

pytestmark = pytest.mark.slow

ROWS = "[...document.querySelectorAll('table.sortable tbody tr')]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """200 runs of two tasks and two methods: scores 0.500, 0.501 … in a mixed order, one failed, one not started."""
    folder = tmp_path_factory.mktemp("page of runs")
    runs_dir = folder / "runs"
    planned = [plan(task, "tiny", method, s) for task in ("rte", "mrpc") for method in ("adamw", "sam")
               for s in range(50)]  # fmt: skip
    sweep(runs_dir, "big", planned)
    for number, run in enumerate(planned[:-2]):
        finish(runs_dir, run, best=0.5 + number * 7 % 200 / 1000, last=0.5)
    fail(runs_dir, planned[-2])
    return report.make("big", runs_dir, folder / "tables", folder / "figures")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium here, and it cannot be installed (only root can, by apt)")
    with Page(chromium, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def page(browser, made):
    """The report, opened anew."""
    browser.open(made.html)
    yield browser
    assert browser.errors == []
    assert {a for a in browser.requests if not a.startswith("data:")} == {made.html.resolve().as_uri()}


def column(page, number):
    return page.run(f"{ROWS}.map(row => row.cells[{number - 1}].textContent)")


def head(number):
    return f"table.sortable th:nth-child({number}) button"


def sorted_as(page):
    return page.run("[...document.querySelectorAll('table.sortable th')].map(head => head.getAttribute('aria-sort'))")


def test_a_click_on_a_head_sorts_and_another_turns_it_round(page):
    planned = column(page, 10)
    assert len(planned) == 200 and sorted_as(page) == [None] * 10
    page.click(head(4))
    seeds = column(page, 4)
    assert seeds == sorted(seeds, key=int) and seeds != sorted(seeds)  # as numbers, not as text
    assert sorted_as(page) == [None] * 3 + ["ascending"] + [None] * 6
    page.click(head(6))
    scores = column(page, 6)
    assert [*map(float, scores[:-2])] == sorted(map(float, scores[:-2])) and scores[-2:] == ["–", "–"]
    page.click(head(6))
    scores = column(page, 6)
    assert [*map(float, scores[:-2])] == sorted(map(float, scores[:-2]), reverse=True) and scores[-2:] == ["–", "–"]
    assert sorted_as(page) == [None] * 5 + ["descending"] + [None] * 4
    page.click(head(3))
    assert column(page, 3) == ["adamw"] * 100 + ["sam"] * 100
    assert sorted(column(page, 10)) == sorted(planned)  # none lost, none twice


def test_the_keyboard_does_what_the_mouse_does(page):
    page.run(f"document.querySelector({head(3)!r}).focus()")
    page.press("Tab")
    page.press("Enter", "\r")
    assert sorted_as(page)[3] == "ascending"
    page.press(" ", " ")
    assert sorted_as(page)[3] == "descending" and column(page, 4)[0] == "49"


def test_the_filter_shows_the_rows_that_hold_its_words(page):
    page.click(".filter")
    page.type("MRPC sam failed")
    assert page.run(f"{ROWS}.filter(row => row.offsetHeight).map(row => row.cells[4].textContent)") == ["failed"]
    assert page.run("document.querySelector('output').value") == "1 of 200 rows"


def test_each_link_leads_to_a_run_folder(page, made):
    links = page.run("[...document.querySelectorAll('table.sortable a')].map(a => [a.getAttribute('href'), a.href])")
    assert len(links) == 199  # the run that never started has no folder
    assert all(not href.startswith(("file:", "/")) for href, _ in links)
    there = {path.parent.as_uri() for path in (made.html.parent / "runs").glob("*/*/*/*/*.json")}
    assert {full for _, full in links} == there


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_the_window(page, tmp_path, width):
    page.resize(width, 900)
    assert page.run("document.documentElement.scrollWidth") <= width
    assert page.screenshot(tmp_path / f"report-{width}.png").stat().st_size > 50_000
    height = page.run("document.querySelector('.long:has(table)').getBoundingClientRect().height")
    assert 300 < height < 900  # 200 rows scroll in a box of their own


def test_the_browser_tells_what_goes_wrong(browser, tmp_path):
    """Else a page without errors and requests would prove nothing."""
    bad = tmp_path / "bad.html"
    bad.write_text('<script>console.error("one")</script><script>two()</script><img src="https://example.org/three">')
    errors, requests = list(browser.errors), list(browser.requests)
    browser.open(bad)
    new = browser.errors[len(errors) :]
    assert any("one" in error for error in new) and any("two is not defined" in error for error in new)
    assert browser.requests[len(requests) :] == [bad.as_uri(), "https://example.org/three"]
    browser.errors[:], browser.requests[:] = errors, requests
