"""The documentation site: it builds without warnings, needs no network and works in a browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mtp_lightning.command_line.conf_comments import groups
from tests.integration.helpers import ROOT, environment
from tests.sweeps.browser import Browser, browser

__all__ = ["browser"]

pytestmark = pytest.mark.extras
NOTEBOOK = ROOT / "docs" / "tutorial" / "notebook.ipynb"
BROWSED = (
    "index", "zh/index", "tutorial/first_run", "tutorial/notebook", "results", "reference/settings",
)  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    env = {**environment(), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


class Page(HTMLParser):
    """The URLs that a page loads, its headings, and its images without alternative text."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.headings: list[int] = []
        self.without_alt: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.loaded += filter(None, [attributes.get("src")])
        if tag == "link" and attributes.get("rel") != "canonical":
            self.loaded += filter(None, [attributes.get("href")])
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "img" and not attributes.get("alt"):
            self.without_alt.append(str(attributes.get("src"))[:80])


def test_every_page_is_built_and_loads_nothing_from_the_network(site: Path) -> None:
    sources = {f.relative_to(ROOT / "docs") for f in (ROOT / "docs").rglob("*.md")}
    for source in sources:
        assert (site / source.with_suffix(".html")).is_file(), source
    pages = [file for file in site.rglob("*.html") if file.name != "404.html"]
    assert len(pages) >= len(sources) + 4  # settings, Python, contributing, changelog
    for file in pages:
        page = Page(file)
        assert not [url for url in page.loaded if url.startswith(("http", "//"))], file
        assert page.without_alt == [], file
        assert page.headings.count(1) == 1, file
        steps = zip(page.headings, page.headings[1:], strict=False)
        assert all(after <= before + 1 for before, after in steps), f"{file} leaves a level out"


def test_the_front_page_has_cards_and_pictures(site: Path) -> None:
    page = (site / "index.html").read_text(encoding="utf-8")
    for who in ("Student", "Researcher", "Engineer"):
        assert f"<strong>{who}</strong>" in page
    assert 'src="images/smollm2_heads.svg"' in page and 'src="assets/terminal-light.svg"' in page


@pytest.mark.parametrize(
    ("readme", "at"), [("README.md", "index.html"), ("README.zh-CN.md", "zh/index.html")]
)
def test_the_front_page_answers_the_questions(site: Path, readme: str, at: str) -> None:
    page = (site / at).read_text(encoding="utf-8")
    text = (ROOT / readme).read_text(encoding="utf-8")
    block = re.split("<!-- /?claims.*?-->", text)[1]
    questions = re.findall(r"^\*\*([^*]+[?？])\*\*", block, re.MULTILINE)
    assert len(questions) == 3
    for question in questions:
        assert f"<strong>{question}</strong>" in page
    assert page.count("<table>") == len(re.findall(r"^\|[-|]+\|$", text, re.MULTILINE)) > 3


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        ("https://example.org/a/b.git", "https://example.org/a/b"),
        ("https://me:secret@example.org/a/b", "https://example.org/a/b"),
        ("git@example.org:a/b.git", "https://example.org/a/b"),
        ("ssh://git@example.org/a/b.git", "https://example.org/a/b"),
        ("/home/me/b", None),
        (None, None),
    ],
)
def test_the_site_links_to_the_origin_of_the_clone(origin, url, tmp_path, monkeypatch):
    pytest.importorskip("mkdocs", reason="needs pip install -e '.[docs]'")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import hooks

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    if origin:
        subprocess.run(["git", "remote", "add", "origin", origin], cwd=tmp_path, check=True)
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.repository() == url


def test_the_settings_page_has_every_key_of_conf(site: Path) -> None:
    page = (site / "reference" / "settings.html").read_text(encoding="utf-8")
    for group, options in groups().items():
        for option in options.values():
            assert f">{group}={option.name}<" in page or f">{option.name}.yaml<" in page
            for key in option.keys:
                assert f">{key.name}<" in page, f"{group}={option.name}: {key.name}"
    assert "tokens predicted beyond the next one" in page


def test_the_search_index_has_the_pages(site: Path) -> None:
    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    pages = {entry["location"].partition("#")[0] for entry in index["docs"]}
    assert {"glossary.html", "reference/settings.html", "reference/python.html"} <= pages


def test_the_notebook_is_stored_executed_in_order() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert {"image/png", "text/html"} <= kinds, "a picture, a table and colored text"


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs pip install -e '.[docs]'")
    nbformat = pytest.importorskip("nbformat")
    text = NOTEBOOK.read_text(encoding="utf-8")
    text = text.replace("max_steps=200", "max_steps=4").replace("interval=50", "interval=2")
    notebook = nbformat.reads(text, 4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()
    table = notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert "val/bits_per_byte" in table and len(table.splitlines()) == 3, table


@pytest.mark.browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("page", BROWSED)
def test_pages_fit_and_are_accessible_in_a_browser(browser, site, page, width, dark):
    """No complaint on the console, nothing sticks out, and axe finds no serious barrier."""
    axe = pytest.importorskip("axe_core_python", reason="needs pip install -e '.[docs]'")
    browser.show(width=width, dark=dark)
    browser.open(site / f"{page}.html")
    browser.run("localStorage.clear()")  # a scheme that was chosen stays chosen
    browser.events.clear()
    browser.open(site / f"{page}.html")
    assert browser.complaints() == []
    scheme = browser.run("document.body.getAttribute('data-md-color-scheme')")
    assert scheme == ("slate" if dark else "default")
    assert browser.run("document.documentElement.scrollWidth") <= width
    script = (Path(axe.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    browser.run(f"{script};0")
    found = browser.call(
        "Runtime.evaluate",
        expression="axe.run(document, {resultTypes: ['violations']}).then(found => found.violations"
        ".filter(one => ['serious', 'critical'].includes(one.impact))"
        ".map(one => [one.id, one.nodes.map(node => node.html)]))",
        awaitPromise=True,
        returnByValue=True,
    )["result"]["value"]
    assert found == []


@pytest.mark.browser
def test_the_search_works_without_a_server(browser: Browser, site: Path) -> None:
    browser.show(width=1280)
    browser.open(site / "index.html")
    browser.run("""(() => {
        const field = document.querySelector(".md-search__input");
        field.focus();
        field.value = "acceptance";
        for (const event of ["input", "keyup"]) {
            field.dispatchEvent(new KeyboardEvent(event, {bubbles: true}));
        }
    })()""")
    results = "document.querySelectorAll('.md-search-result__link').length"
    for _ in range(50):
        if browser.run(results):
            break
        time.sleep(0.2)
    assert browser.run(results) > 0
