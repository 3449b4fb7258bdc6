"""Every page that the project writes, from data in which every string is markup: in a parser and in
a browser, the data stays text, does not run and loads nothing."""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from http.server import ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("scipy")

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.decoding import Generation
from mtp_lightning.interop import card, stack_file
from mtp_lightning.interop.writing import Contents
from mtp_lightning.notebook import Run, Sweep
from mtp_lightning.notebook.text import Text
from sweeps.claims.figure import write_figures
from sweeps.claims.pages import BEGIN, END, write_pages
from sweeps.claims.result import make_result, write_result
from sweeps.report.__main__ import report
from sweeps.report.watch import Pages
from tests import hostile
from tests.decoding.models import small_model
from tests.hostile import MARKS, NAMES, Page
from tests.sweeps.browser import Browser, browser
from tests.sweeps.claims.fixture_claims import claim_of, observed, write_claim

__all__ = ["browser"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile.sweep(tmp_path_factory.mktemp("loss") / NAMES[0])


def of_losses(folder: Path, sweep: Path) -> Path:
    return report([sweep], output=folder, watched=True)[0]


def of_a_task(folder: Path, sweep: Path) -> Path:
    return report([hostile.sweep(folder / NAMES[1], task=True)])[0]


def of_two_sweeps(folder: Path, sweep: Path) -> Path:
    other = hostile.small_sweep(folder / NAMES[2])
    return report([other, hostile.small_sweep(folder / NAMES[3])], output=folder / "both")[0]


def of_claims(folder: Path, sweep: Path) -> Path:
    """docs/results.md and the README, as the site shows them."""
    site = folder / "docs"
    for page in (site / "results.md", folder / "README.md"):
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"{BEGIN}{END}", encoding="utf-8")
    arms = {mark: ["mtp=none"] for mark in MARKS}
    changes = {"published": MARKS[0], "measure": {"tag": MARKS[1]}}
    predictions = [{"arm": a, "against": b, "side": "below", **changes} for a, b in pairwise(MARKS)]
    texts = {"sentence": MARKS[5], "source": MARKS[1], "note": MARKS[6]}
    claim = claim_of(folder / "claims", arms=arms, predictions=predictions, **texts)
    values = [0.1, 0.2, 0.4, 0.3, 0.2]
    observations = observed(claim, dict.fromkeys(arms, values) | {MARKS[2]: ["failed"] * 5})
    for seeds in observations.values():
        for number, seed in seeds.items():
            if seed.state == "done":
                seeds[number] = replace(seed, machine=MARKS[number], commit=MARKS[7])
    result = make_result(claim, observations, ("2026-11-25T09:00:00+00:00", MARKS[0]))
    result["date"], result["unfinished"] = MARKS[4], list(MARKS)
    write_result(result, "mine", folder / "results")
    write_figures(result, "mine", folder / "results")
    write_claim(folder / "claims", "other", arms=arms, predictions=predictions, **texts)
    write_pages(folder, folder / "claims")
    text = (site / "results.md").read_text() + (folder / "README.md").read_text()
    return shown(site / "claims.html", text)


def of_a_card(folder: Path, sweep: Path) -> Path:
    """The model card of an export, from a foreign config and summary."""
    summary = {key: MARKS[0] for _, key, _ in card._SUMMARY}
    summary |= {f"{rate}_{k}": MARKS[1] for rate in ("val/loss_depth", MARKS[0]) for k in range(3)}
    config = small_model(1, 2, vocab=64).config
    foreign = {"init_from": MARKS[2], "seed": MARKS[5], "mtp_lambda": list(MARKS)}
    text = card.render(
        MARKS[0],
        config,
        Contents(modules=0, heads=stack_file.FILE, parameters=9, shards=1),
        mtp=config.mtp,
        model_type="llama",
        dtype="float32",
        step=6,
        run_config={**foreign, "data": {"seq_len": MARKS[1]}},
        summary=summary,
    )
    return shown(folder / "card.html", text.partition("---\n")[2].partition("---\n")[2])


def of_a_notebook(folder: Path, sweep: Path) -> Path:
    """The outputs of runs, a sweep and a text in a notebook."""
    whole = next(run for run in sweep.iterdir() if (run / "summary.json").exists())
    summary = json.loads((whole / "summary.json").read_text())
    copy = folder / NAMES[0]
    copy.mkdir()
    (copy / "summary.json").write_text(json.dumps({**summary, "tokens": MARKS[0]}))
    text = "".join(MARKS)
    ids = list(text.encode())
    drafts = [number // 50 % 2 > 0 for number in range(len(ids))]  # whole marks of both kinds
    generation = Generation(ids, text, "stop", 1.0, 3, [3], [6], drafts)
    shown_text = Text(MARKS[1], generation, ByteTokenizer())
    parts: list[Any] = [Run(copy), Run(folder), Sweep(sweep), shown_text]
    return page_of(folder / "notebook.html", "\n".join(part._repr_html_() for part in parts))


def shown(file: Path, text: str) -> Path:
    """Markdown as the documentation's site shows it, and again by the rules of CommonMark."""
    import markdown
    from markdown_it import MarkdownIt

    extensions = ["admonition", "attr_list", "md_in_html", "tables", "toc", "fenced_code"]
    by_site = markdown.markdown(text, extensions=extensions)
    return page_of(file, by_site + MarkdownIt("commonmark").enable("table").render(text))


def page_of(file: Path, body: str) -> Path:
    """A page that allows everything, so that what is not text would run."""
    file.write_text(f"<!doctype html><meta charset=utf-8><title>x</title><body>{body}")
    return file


REPORTS = (of_losses, of_a_task, of_two_sweeps)
PAGES: tuple[Callable[[Path, Path], Path], ...] = (*REPORTS, of_claims, of_a_card, of_a_notebook)


@pytest.fixture(scope="module")
def make_page(
    tmp_path_factory: pytest.TempPathFactory, sweep: Path
) -> Callable[[Callable[[Path, Path], Path]], Path]:
    """Makes each page once."""
    written: dict[str, Path] = {}

    def make(page: Callable[[Path, Path], Path]) -> Path:
        if page.__name__ not in written:
            # What has no text is not drawn: it would take half of the time.
            with mock.patch("sweeps.report.chart.Chart.png", return_value=bytes(32)):
                written[page.__name__] = page(tmp_path_factory.mktemp(page.__name__), sweep)
        return written[page.__name__]

    return make


MakePage = Callable[[Callable[[Path, Path], Path]], Path]


@pytest.mark.parametrize("page", PAGES)
def test_markup_in_data_is_text(make_page: MakePage, page: Callable[[Path, Path], Path]) -> None:
    parsed = Page(make_page(page).read_text(encoding="utf-8"))
    assert parsed.wrong == []
    assert parsed.tags["script"] == (2 if page in REPORTS else 0)
    # Of claims, their figures.
    assert set(parsed.images) <= {"../results/mine.svg", "../results/mine_2.svg"}
    assert MARKS[0] in parsed.texts and MARKS[1] in parsed.texts


@pytest.mark.parametrize("page", REPORTS)
def test_a_report_allows_only_its_own_style_and_script(make_page, page):
    html = make_page(page).read_text(encoding="utf-8")
    policy = html.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy and "script-src 'sha256-" in policy
    assert " style=" not in html and html.count("<style>") == 1


def test_markup_in_a_figure_is_text(make_page: MakePage) -> None:
    files = [file for page in REPORTS for file in make_page(page).parent.glob("figures/*.svg")]
    files += make_page(of_claims).parent.glob("../results/*.svg")
    assert len(files) > 20
    for file in files:
        for element in ElementTree.parse(file).iter():
            name = element.tag.rpartition("}")[2]
            assert name not in ("script", "img", "image", "x-hit", "foreignObject", "a"), file
            assert not [key for key in element.attrib if key.startswith(("on", "x-hit"))], file


# In a browser.

# Everything that a reader can press, move over or choose.
_PRESS_ALL = """(() => {
    for (const one of document.querySelectorAll("[role=button], button, summary, path, use")) {
        for (const kind of ["focus", "click", "click", "pointermove", "mouseover"])
            one.dispatchEvent(new MouseEvent(kind, {bubbles: true, clientX: 300, clientY: 300}));
    }
    for (const one of document.querySelectorAll("select")) {
        for (let i = 0; i < one.options.length; i++) {
            one.selectedIndex = i;
            one.dispatchEvent(new Event("change"));
        }
    }
    for (const one of document.querySelectorAll("details")) one.open = true;
})()"""


def use_page(browser: Browser, page: Path | str) -> str:
    """Use every control of a page, and assert that nothing ran or was loaded; its text."""
    browser.events.clear()
    browser.open(page)
    browser.run(_PRESS_ALL)
    browser.run("new Promise(done => setTimeout(done, 100))")
    assert browser.run("typeof __hit") == "undefined", "markup in the data has run"
    assert (
        browser.run("document.querySelectorAll('x-hit, [x-hit], img[src=q], [onerror]').length")
        == 0
    )
    address = page if isinstance(page, str) else page.resolve().as_uri()
    assert [url for url in browser.requests() if "/results/mine" not in url] == [address]
    assert set(browser.complaints()) <= {f"request to {address}"}
    return str(browser.run("document.documentElement.textContent"))


@pytest.mark.browser
@pytest.mark.parametrize("page", PAGES)
def test_markup_in_data_does_not_run_in_a_browser(browser, make_page, page):
    text = use_page(browser, make_page(page))
    assert MARKS[0] in text and MARKS[1] in text


@pytest.mark.browser
def test_markup_in_a_figure_does_not_run_in_a_browser(browser, make_page):
    for file in make_page(of_losses).parent.glob("figures/*.svg"):
        use_page(browser, file)


@pytest.mark.browser
def test_the_policy_stops_inserted_markup(browser: Browser, make_page: MakePage) -> None:
    browser.open(make_page(of_losses))
    browser.events.clear()
    browser.run("""(() => {
        document.body.insertAdjacentHTML("beforeend",
            "<img src=q onerror=__hit=1><p style='color: red' onclick=__hit=1>x</p>");
        const script = document.createElement("script");
        script.textContent = "__hit=1";
        document.body.append(script);
        document.body.lastElementChild.previousElementSibling.click();
        document.querySelector("a").href = "javascript:__hit=1";
        document.querySelector("a").click();
    })()""")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("typeof __hit") == "undefined"
    assert (
        browser.run("getComputedStyle(document.querySelector('p[style]')).color")
        != "rgb(255, 0, 0)"
    )
    complaints = "\n".join(browser.complaints())
    assert "script-src" in complaints and "style-src" in complaints and "image" in complaints
    assert browser.requests() == []


@pytest.mark.browser
def test_markup_on_the_watched_page_does_not_run(browser: Browser, make_page: MakePage) -> None:
    page = make_page(of_losses)
    handler = partial(Pages, directory=str(page.parent))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            at = f"http://127.0.0.1:{server.server_port}"
            assert MARKS[0] in use_page(browser, f"{at}/report.html")
            browser.open(f"{at}/<img src=q onerror=__hit=1 x-hit>")
            assert browser.run("typeof __hit") == "undefined"
            assert browser.run("document.querySelectorAll('x-hit, img').length") == 0
        finally:
            server.shutdown()
