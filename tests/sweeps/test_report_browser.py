"""The report's page in a real browser: sorting, figures, narrow windows and the dark scheme."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweeps.report.__main__ import report
from tests.sweeps.browser import Browser, browser
from tests.sweeps.fixture_runs import depth_sweep, write_run

__all__ = ["browser"]

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with gaps, failures and long names."""
    folder = tmp_path_factory.mktemp("sweep")
    losses = {0: (2.0, 2.1, 2.2), 1: (1.9, 2.05, 2.0), 2: (1.8, 1.9, 2.0), 10: (1.85, float("nan"))}
    depth_sweep(folder, losses)
    reason = "a word" + 60 * "x" + " that does not end"
    failed = {"state": "failed", "reason": reason, "overrides": []}
    write_run(folder / ("job_" + 80 * "y"), {"seed": 9}, status=failed, done=False)
    write_run(folder / "other_code", {"seed": 4}, loss=2.0, summary={"git_commit": "b" * 40})
    return report([folder])[0]


def column(browser: Browser, name: str) -> list[str]:
    """The first table's cells under a header."""
    return browser.run(
        f"""(() => {{
            const table = document.querySelector("table.sortable");
            const heads = [...table.tHead.rows[0].cells];
            const at = heads.findIndex(cell => cell.innerText.includes({name!r}));
            return [...table.tBodies[0].rows].map(row => row.cells[at].innerText.trim());
        }})()"""
    )


def click(browser: Browser, name: str) -> str:
    """Press a header of the first table with the mouse; its aria-sort afterwards."""
    find = f"""[...document.querySelectorAll("table.sortable th button")]
        .find(button => button.parentElement.innerText.includes({name!r}))"""
    browser.run(f"{find}.scrollIntoView({{block: 'center', inline: 'center'}})")
    box = browser.run(f"{find}.getBoundingClientRect().toJSON()")
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for kind in ("mousePressed", "mouseReleased"):
        browser.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
    return browser.run(f"{find}.parentElement.getAttribute('aria-sort')")


def test_tables_sort_by_a_clicked_column(browser: Browser, page: Path) -> None:
    browser.show(width=1280)
    browser.open(page)
    assert column(browser, "mtp.depth") == ["0", "1", "2", "10"]
    assert click(browser, "nats per token") == "ascending"
    # The gap of depth 10 stays last in both directions.
    assert column(browser, "mtp.depth") == ["2", "1", "0", "10"]
    assert click(browser, "nats per token") == "descending"
    assert column(browser, "mtp.depth") == ["0", "1", "2", "10"]
    assert click(browser, "mtp.depth") == "ascending"
    assert click(browser, "mtp.depth") == "descending"
    assert column(browser, "mtp.depth") == ["10", "2", "1", "0"]  # by number, not by letter
    sorted_columns = "document.querySelectorAll('th[aria-sort$=ending]').length"
    assert browser.run(sorted_columns) == 1


def test_tables_sort_by_keyboard(browser: Browser, page: Path) -> None:
    browser.show(width=1280)
    browser.open(page)
    browser.run("document.querySelector('table.sortable th button').focus()")
    for kind in ("keyDown", "keyUp"):
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        browser.call("Input.dispatchKeyEvent", type=kind, **key)
    assert browser.run("document.querySelector('th').getAttribute('aria-sort')") == "ascending"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_fits_its_window_without_errors(browser, page, tmp_path, width, dark):
    browser.events.clear()
    browser.show(width=width, dark=dark)
    browser.open(page)
    assert browser.complaints() == []
    # Nothing is wider than the window: wide tables scroll in their own frames.
    assert browser.run("document.documentElement.scrollWidth") <= width
    outside = f"""[...document.querySelectorAll("p, li, h1, h2, h3, figure, svg.figure, .table")]
        .filter(one => one.getBoundingClientRect().right > {width}).length"""
    assert browser.run(outside) == 0
    figures = browser.run("""[...document.querySelectorAll("figure svg")].map(svg =>
        [svg.getBoundingClientRect().width, svg.querySelectorAll("path").length])""")
    assert len(figures) >= 8
    assert all(wide > 300 and paths > 5 for wide, paths in figures)
    # A table that scrolls has a shadow, and its first column, which stays, lines and a background.
    styles = browser.run("""(() => {
        const [frame, name] = ["", " tbody tr + tr th"].map(part =>
            getComputedStyle(document.querySelector(".table" + part)));
        return [frame.backgroundAttachment, name.borderTopWidth, name.borderRightWidth,
                name.backgroundColor === getComputedStyle(document.body).backgroundColor];
    })()""")
    assert styles == ["local, scroll", "1px", "1px", True]
    # Text of figures, in CSS pixels.
    smallest = browser.run("""Math.min(...[...document.querySelectorAll("figure svg text")]
        .map(text => text.getBoundingClientRect().height).filter(height => height > 0))""")
    assert smallest >= 9
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(browser: Browser, page: Path, dark: bool) -> None:
    """WCAG's 4.5 : 1 for all text of the page, its figures' axes included."""
    browser.show(width=1280, dark=dark)
    browser.open(page)
    ratios = browser.run("""(() => {
        const numbers = color => color.match(/[\\d.]+/g).map(Number);
        const light = color => numbers(color).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const background = node => {
            for (; node; node = node.parentElement) {
                const color = getComputedStyle(node).backgroundColor;
                if ((numbers(color)[3] ?? 1) > 0) return color;
            }
        };
        return [...document.querySelectorAll(
            "p, li, h1, h2, h3, caption span, th, td, small, .half, .gap, a, figcaption, svg text"
        )].filter(node => !(node.closest("#figure-heat_map") && node.tagName === "text"))
        .map(node => {
            const style = getComputedStyle(node);
            const [a, b] = [light(node.tagName === "text" ? style.fill : style.color),
                            light(background(node))];
            return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.textContent];
        }).filter(([ratio]) => ratio < 4.5);
    })()""")
    assert ratios == []
    page_is_dark = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (page_is_dark == "rgb(20, 24, 29)") == dark


def test_points_show_their_values_and_legends_hide_settings(browser: Browser, page: Path) -> None:
    browser.show(width=1280)
    browser.open(page)
    browser.run("sessionStorage.clear()")
    browser.open(page)
    # Over the third setting's point at depth 0, whose mean is (1.8 + 1.9 + 2.0) / 3.
    title = browser.run("""(() => {
        const figure = document.querySelector('#figure-loss_depth');
        figure.scrollIntoView({block: 'center'});
        const box = figure.querySelector('circle.series-2').getBoundingClientRect();
        const top = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
        return top.querySelector('title')?.textContent;
    })()""")
    assert title.splitlines()[0] == "D = 2"
    assert "nats per token: 1.9 ± 0.24841" in title, title
    # A click on a legend entry hides its setting in every figure; a second click shows it.
    hidden = """[...document.querySelectorAll('[id*="-series-2-"], .series-2')]
        .filter(one => getComputedStyle(one).display === 'none').length"""
    marks = browser.run("document.querySelectorAll('[id*=\"-series-2-\"], .series-2').length")
    switch = "document.querySelector('[id^=\"loss_depth-switch-2-\"][role=button]')"
    click = f"{switch}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))"
    assert marks > 3 and browser.run(hidden) == 0
    browser.run(click)
    assert browser.run(hidden) == marks
    assert browser.run(f"{switch}.getAttribute('aria-pressed')") == "false"
    browser.open(page)
    assert browser.run(hidden) == marks, "kept while the page loads itself again"
    browser.run(click)
    assert browser.run(hidden) == 0
    assert browser.complaints() == []


def test_configs_of_two_runs_are_compared(browser: Browser, page: Path) -> None:
    browser.show(width=1280)
    browser.open(page)
    rows = "[...document.querySelectorAll('#diff tbody th')].map(cell => cell.textContent)"
    browser.run("""(() => {
        const find = (depth, seed) => Object.entries(data.configs)
            .find(([, c]) => c["mtp.depth"] === depth && c.seed === seed)[0];
        left.value = find("0", "0");
        right.value = find("2", "0");
        right.dispatchEvent(new Event("change"));
    })()""")
    assert browser.run(rows) == ["data.depth", "mtp.depth"]
    browser.run("right.value = left.value; right.dispatchEvent(new Event('change'))")
    assert browser.run(rows) == []
    assert not browser.run("document.getElementById('same').hidden")
