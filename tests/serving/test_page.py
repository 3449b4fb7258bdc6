"""The drafts in streams, and the page at ``/`` that shows them."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.decoding.adaptive import Measured, Payoff
from mtp_lightning.decoding.options import DecodingOptions
from mtp_lightning.opening import OpenedModel
from mtp_lightning.paths import ROOT
from tests.hostile import MARKS, Page
from tests.serving.conftest import Serving, generation, serving
from tests.sweeps.browser import Browser, browser

__all__ = ["browser"]

HTML = (ROOT / "mtp_lightning" / "serving" / "page.html").read_text(encoding="utf-8")
SAMPLING: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "stop": ["e", "\n"]}]


def streamed(served: Serving, **fields: Any) -> list[dict[str, Any]]:
    return served.stream(**{"prompt": "import os", "max_tokens": 40, "seed": 5, **fields})


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.fixture(scope="module")
def served(run: OpenedModel) -> Iterator[Serving]:
    with serving(run, batch_size=2) as server:
        yield server


@pytest.fixture(scope="module")
def served_trees(run: OpenedModel) -> Iterator[Serving]:
    with serving(run, batch_size=1, tree=[3, 2]) as server:
        yield server


@pytest.mark.extras
@pytest.mark.parametrize("fields", SAMPLING, ids=str)
@pytest.mark.parametrize("tree", [None, [3, 2]], ids=str)
def test_streams_have_the_depth_and_rejected_drafts_of_each_token(
    run: OpenedModel,
    served: Serving,
    served_trees: Serving,
    tree: list[int] | None,
    fields: dict[str, Any],
) -> None:
    server = served_trees if tree else served
    chunks = streamed(server, **fields, stream_options={"include_drafts": True})
    expected = generation(run, "import os", 40, **fields, tree=tree, seed=5)
    with_drafts = [chunk for chunk in chunks if "mtp" in chunk]
    for chunk in with_drafts[:-1]:
        pieces = "".join(token["text"] for token in chunk["mtp"]["tokens"])
        assert pieces == chunk["choices"][0]["text"]
    tokens = [token for chunk in with_drafts for token in chunk["mtp"]["tokens"]]
    assert [t["depth"] > 0 for t in tokens] == expected.accepted_mask[: len(tokens)]
    assert len(tokens) >= len(expected.token_ids) - 1
    assert [t["depth"] for t in tokens if t["depth"]].count(1) == expected.drafts_accepted[0]
    drafts = [draft for t in tokens for draft in t.get("rejected", [])]
    wanted = [draft for draft in expected.rejected if draft.at < len(tokens)]
    assert [(d["depth"], d["after"]) for d in drafts] == [(d.depth, d.after) for d in wanted]
    assert len(drafts) > 5 and {d["depth"] for d in drafts} == {1, 2}
    for token in tokens:  # a draft follows one that is a depth above it
        rejected = token.get("rejected", [])
        for draft in rejected:
            assert draft["after"] is None or (
                rejected[draft["after"]]["depth"] == draft["depth"] - 1
            )
    seconds = [chunk["mtp"]["seconds"] for chunk in with_drafts]
    assert seconds == sorted(seconds)
    plain = streamed(server, **fields)
    assert all("mtp" not in chunk for chunk in plain)
    assert text_of(plain) == expected.text == text_of(chunks)


@pytest.mark.extras
def test_streams_mark_looked_up_tokens_and_drafts(run: OpenedModel) -> None:
    fields = {"prompt": "import os" * 8, "max_tokens": 60, "temperature": 0}
    with serving(run, lookup=8) as server:
        chunks = streamed(server, **fields, stream_options={"include_drafts": True})
    expected = generation(run, fields["prompt"], 60, temperature=0, lookup=8, draft_depth=2)
    tokens = [token for c in chunks if "mtp" in c for token in c["mtp"]["tokens"]]
    assert [t.get("looked_up", False) for t in tokens] == expected.lookup_mask[: len(tokens)]
    assert sum(expected.lookup_mask) == expected.lookups_accepted > 0
    drafts = [draft for t in tokens for draft in t.get("rejected", [])]
    looked_up = [draft.looked_up for draft in expected.rejected if draft.at < len(tokens)]
    assert [draft.get("looked_up", False) for draft in drafts] == looked_up
    assert set(looked_up) == {False, True}


@pytest.mark.extras
def test_draft_depth_limits_the_drafts_of_a_request(run: OpenedModel, served: Serving) -> None:
    fields = {"prompt": "def main(", "seed": 1, "stream_options": {"include_drafts": True}}
    texts = set()
    for depth in (0, 1, 2):
        chunks = streamed(served, temperature=1, draft_depth=depth, **fields)
        depths = [t["depth"] for c in chunks if "mtp" in c for t in c["mtp"]["tokens"]]
        assert max(depths) == depth and len(depths) > 30
        chunks = streamed(served, temperature=0, draft_depth=depth, **fields)
        texts.add(text_of(chunks))
    assert len(texts) == 1


def test_the_page_is_one_file_that_loads_nothing() -> None:
    page = Page(HTML)
    assert page.wrong == [] and page.images == []
    assert page.tags["script"] == page.tags["style"] == 1
    assert not page.tags["link"] and not page.tags["img"]
    assert " style=" not in HTML and "url(" not in HTML and "@import" not in HTML
    script = re.findall(r"<script>(.*?)</script>", HTML, re.DOTALL)[0]
    # Text becomes markup by none of these.
    for name in [
        "innerHTML",
        "outerHTML",
        "insertAdjacent",
        "document.write",
        "eval(",
        "Function(",
    ]:
        assert name not in script, name
    assert re.findall(r"fetch\(([^,)]*)", script) == [
        'chat ? "v1/chat/completions" : "v1/completions"',
        '"v1/models"',
    ]
    # Every control has a name, and the script finds what it asks for.
    ids = set(re.findall(r'\bid="([^"]+)"', HTML))
    assert set(re.findall(r'\$\("([^"]+)"\)', script)) <= ids
    assert HTML.count('lang="en"') == 1 and 'name="viewport"' in HTML


@pytest.mark.extras
def test_the_content_security_policy_allows_code_by_hash_alone(served: Serving) -> None:
    answer = served.get("")
    assert answer.status_code == 200 and answer.text == HTML
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")
    )
    for name in ("script", "style"):
        (text,) = re.findall(f"<{name}>(.*?)</{name}>", HTML, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy.pop(f"{name}-src") == f"'sha256-{digest}'"
    assert policy.pop("connect-src") == "'self'"
    assert set(policy.values()) == {"'none'"}
    assert {"default-src", "base-uri", "form-action", "frame-ancestors"} == set(policy)
    assert served.get("", host="evil.example").status_code == 421


in_a_browser = pytest.mark.browser


def open_page(browser: Browser, served: Serving, *, width: int = 1280, dark: bool = False) -> None:
    browser.show(width=width, dark=dark)
    browser.open(f"http://127.0.0.1:{served.port}/")
    wait_for(browser, "document.title !== 'mtp-lightning'")
    browser.run("document.getElementById('tokens').value = 40")


def wait_for(browser: Browser, condition: str) -> None:
    end = time.monotonic() + 60
    while not browser.run(condition):
        assert time.monotonic() < end, browser.run("document.body.innerText")
        time.sleep(0.02)


def wait_for_text(browser: Browser) -> None:
    wait_for(browser, "!document.getElementById('write').disabled")


def press(browser: Browser, name: str) -> None:
    browser.run(f"document.getElementById('{name}').click()")
    wait_for_text(browser)


def key(browser: Browser, name: str, modifiers: int = 0, text: str = "") -> None:
    code = {"Enter": 13, "Escape": 27, "Tab": 9}[name]
    event = {"key": name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
    browser.call(
        "Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {})
    )
    browser.call("Input.dispatchKeyEvent", type="keyUp", **event)


TEXT = """[...document.querySelectorAll('pre')].map(pre =>
    [...pre.children].filter(one => !one.matches('.soft, .rejected'))
        .map(one => one.textContent).join(''))"""
NUMBERS = """[...document.querySelectorAll('article')].map(one => Object.fromEntries(
    [...one.querySelectorAll('dl div')].map(pair =>
        [pair.querySelector('dt').textContent, pair.querySelector('dd').textContent])))"""


def complaints(browser: Browser) -> list[str]:
    return [line for line in browser.complaints() if not line.startswith("request to http://127.")]


@in_a_browser
def test_a_race_shows_both_texts(run: OpenedModel, served: Serving, browser: Browser) -> None:
    browser.events.clear()
    open_page(browser, served)
    browser.run("document.getElementById('temperature').value = 1")
    press(browser, "race")
    options = {"temperature": 1.0, "seed": 1}
    expected = generation(run, "def main(", 40, **options)
    plain_chunks = streamed(served, prompt="def main(", draft_depth=0, **options)
    texts = [expected.text, text_of(plain_chunks)]
    assert browser.run(TEXT) == texts
    drafted, plain = browser.run(NUMBERS)
    passes = expected.verify_passes + 1
    assert drafted["tokens"] == plain["tokens"] == plain["passes"] == "40"
    assert drafted["passes"] == str(passes)
    assert drafted["tokens / pass"] == f"{40 / passes:.2f}" and plain["tokens / pass"] == "1.00"
    first = "document.querySelector('article')"
    for depth in (1, 2):
        accepted = f"{first}.querySelectorAll('pre .draft.d{depth}').length"
        assert browser.run(accepted) == expected.drafts_accepted[depth - 1] > 0
    drafts = [draft for draft in expected.rejected if draft.at < 40]
    rejected = f"{first}.querySelectorAll('pre .rejected')"
    assert browser.run(f"{rejected}.length") == len(drafts) > 5
    status = browser.run("document.getElementById('status').textContent")
    assert re.fullmatch(
        r"With drafts [\d.]+ × the tokens per second: [\d.]+ tokens per pass, "
        r"and a pass takes [\d.]+ × as long\.",
        status,
    )
    assert browser.run(f"{first}.querySelectorAll('.passes svg').length") == 5
    # Rejected drafts can be hidden.
    browser.run("document.querySelector('#legend input').click()")
    assert browser.run(f"getComputedStyle({rejected}[0]).display") == "none"
    browser.run("document.querySelector('#legend input').click()")
    press(browser, "replay")
    assert browser.run(TEXT) == texts
    assert browser.run(NUMBERS)[0] == drafted
    assert complaints(browser) == []
    address = f"http://127.0.0.1:{served.port}/"
    paths = {url.removeprefix(address) for url in browser.requests()}
    assert paths - {"favicon.ico"} == {"", "v1/models", "v1/completions"}


@in_a_browser
def test_settings_tab_order_and_escape(
    served: Serving, browser: Browser, gate: threading.Event
) -> None:
    gate.set()
    open_page(browser, served)
    browser.run("""(() => {
        for (const [id, value] of [["depth", 1], ["temperature", 0.7]]) {
            document.getElementById(id).value = value;
            document.getElementById(id).dispatchEvent(new Event("input"));
        }
        document.getElementById("prompt").focus();
    })()""")
    key(browser, "Enter", modifiers=2)
    wait_for(browser, "document.getElementById('columns').children.length === 1")
    wait_for_text(browser)
    assert browser.run("document.getElementById('depth-shown').textContent") == "1"
    assert browser.run("document.querySelectorAll('pre .d2').length") == 0
    assert browser.run("document.getElementById('status').textContent").startswith("40 tokens in")
    # Tab reaches every control in order.
    browser.run("document.getElementById('prompt').focus()")
    order = []
    for _ in range(6):
        key(browser, "Tab")
        order.append(browser.run("document.activeElement.id"))
    assert order == ["temperature", "depth", "tokens", "seed", "write", "race"]
    # Escape stops a text that is being written, which the gate keeps from ending by itself.
    gate.clear()
    browser.run("document.getElementById('write').click()")
    wait_for(browser, "document.querySelectorAll('pre span').length > 0")
    key(browser, "Escape")
    wait_for_text(browser)
    gate.set()
    assert browser.run("document.getElementById('status').textContent").startswith("Stopped: ")
    served.wait_for("mtp_rows", 0)
    browser.run("document.getElementById('prompt').value = ''")
    press(browser, "write")
    assert "no text" in browser.run("document.getElementById('status').textContent")


@in_a_browser
def test_drafts_start_at_the_servers_default(
    run: OpenedModel, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    none, one = Payoff((1.0, 9.0, 9.0), (0.5, 0.5)), Payoff((1.0, 1.0, 9.0), (0.9, 0.9))
    options = DecodingOptions(draft_depth="auto", measured=Measured(greedy=one, sampled=none))
    monkeypatch.setattr("mtp_lightning.serving.server.decoding_options", lambda *_: options)
    with serving(run) as server:
        (model,) = server.get("v1/models").json()["data"]
        assert model["mtp"]["draft_depth"] == {"greedy": 1, "sampled": 0}
        assert model["mtp"]["max_draft_depth"] == 2
        open_page(browser, server)
        about = "document.getElementById('about').textContent"
        assert "up to 2 tokens, by default 1 (in samples 0); " in browser.run(about)
        for value, depth in ((0, "1"), (1, "0"), (0, "1")):
            browser.run(f"""(() => {{
                document.getElementById("temperature").value = {value};
                document.getElementById("temperature").dispatchEvent(new Event("input"));
            }})()""")
            assert browser.run("document.getElementById('depth-shown').textContent") == depth
        assert browser.run("document.getElementById('depth').max") == "2"


@in_a_browser
def test_long_passes_are_titled_and_drawn_whole(run: OpenedModel, browser: Browser) -> None:
    with serving(run, lookup=4, draft_depth=1, batch_size=1) as server:
        open_page(browser, server, width=800)
        browser.run("document.getElementById('tokens').value = 200")
        browser.run("document.getElementById('prompt').value = 'import os'.repeat(8)")
        press(browser, "race")
        title = browser.run("document.querySelector('article h2').textContent")
        assert title == "With drafts, up to 4 per pass"
        widths = browser.run("""(() => {
            const parent = document.querySelector(".passes");
            parent.replaceChildren();
            const taken = ["a", "b", "c", "a long one"];
            drawPass(parent, {before: "x", taken, own: "y", left: [], number: 1});
            return [parent.scrollWidth, parent.clientWidth];
        })()""")
        assert widths[0] <= widths[1]


@in_a_browser
def test_the_last_pass_of_a_text_counts(run: OpenedModel, browser: Browser) -> None:
    with serving(run, draft_depth=1) as server:
        open_page(browser, server)
        summary = browser.run("""(() => {
            const tokens = [["a", 0], ["b", 1], ["c", 0], ["d", 1]];
            const column = new Column("title", "");
            column.take({tokens: tokens.map(([text, depth]) => ({text, depth})), text: "abcd"});
            return column.told;
        })()""")
        assert summary == "4 tokens in 3 passes, 1.33 per pass; 2 drafts accepted of 2"


@in_a_browser
def test_a_tree_of_drafts_is_drawn(served_trees: Serving, browser: Browser) -> None:
    open_page(browser, served_trees)
    press(browser, "write")
    drawn = browser.run("""[...document.querySelectorAll('.passes svg')].map(svg =>
        [svg.querySelectorAll('rect').length, svg.querySelectorAll('path').length])""")
    # The token before, nine drafts, the model's own; each but the first has a parent.
    assert len(drawn) == 5 and all(paths == boxes - 1 for boxes, paths in drawn)
    assert [11, 10] in drawn


@in_a_browser
def test_a_chat_keeps_its_messages(chat_model: OpenedModel, browser: Browser) -> None:
    with serving(chat_model, batch_size=1) as server:
        open_page(browser, server)
        assert not browser.run("document.getElementById('kinds').hidden")
        browser.run("document.querySelector('[value=chat]').click()")
        for question, earlier in (("Hello", 0), ("<b>And</b>", 2)):
            browser.run(f"document.getElementById('prompt').value = {json.dumps(question)}")
            press(browser, "write")
            lines = "[...document.querySelectorAll('#turns li')].map(one => one.textContent)"
            turns = browser.run(lines)
            assert len(turns) == earlier + 1 and turns[-1] == f"You: {question}"
            assert browser.run("document.getElementById('prompt').value") == ""
        assert turns[1].startswith("Model: ")
        press(browser, "fresh")
        assert browser.run(lines) == []
    assert complaints(browser) == []


class MarkupTokenizer:
    """A tokenizer whose every token is markup."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.eot_id, self.end_ids = inner.eot_id, inner.end_ids

    def encode_prompt(self, text: str) -> Any:
        return self.inner.encode_prompt(text)

    def decode(self, ids: Any) -> str:
        return "".join(MARKS[int(i) % len(MARKS)] for i in ids)

    def token_bytes(self) -> list[bytes]:
        return [MARKS[i % len(MARKS)].encode() for i in range(257)]


class MarkupModel(OpenedModel):
    @property
    def tokenizer(self) -> Any:
        return MarkupTokenizer(super().tokenizer)


@in_a_browser
def test_markup_in_a_text_is_shown_as_text(run: OpenedModel, browser: Browser) -> None:
    model = MarkupModel(**{name: getattr(run, name) for name in run.__dataclass_fields__})
    with serving(model, batch_size=1) as server:
        open_page(browser, server)
        browser.run(f"document.getElementById('prompt').value = {json.dumps(''.join(MARKS))}")
        press(browser, "race")
        browser.run("new Promise(done => setTimeout(done, 100))")
        assert browser.run("typeof __hit") == "undefined"
        wrong = "document.querySelectorAll('x-hit, [x-hit], img, [onerror], [onload]').length"
        assert browser.run(wrong) == 0
        assert MARKS[0] in browser.run(TEXT)[0]
        # Markup that got in would not run.
        browser.run("""document.body.insertAdjacentHTML("beforeend",
            "<img src=x: onerror=__hit=1><p onclick=__hit=1 id=hit>x</p>");
            document.getElementById("hit").click()""")
        assert browser.run("typeof __hit") == "undefined"


@in_a_browser
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 380])
def test_the_page_is_readable_at_each_width_and_theme(
    served: Serving, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    open_page(browser, served, width=width, dark=dark)
    press(browser, "race")
    assert browser.run("document.documentElement.scrollWidth") <= width
    ratios = browser.run("""(() => {
        const canvas = document.createElement("canvas")
            .getContext("2d", {willReadFrequently: true});
        const over = (color, below) => {
            canvas.fillStyle = `rgb(${below})`;
            canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = color;
            canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const light = rgb => rgb.map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const under = node => node
            ? over(getComputedStyle(node).backgroundColor, under(node.parentElement))
            : [255, 255, 255];
        return [...document.querySelectorAll(
            "h1, h2, h3, p, label, dt, dd, button, pre span, #legend span")]
            .filter(node => node.textContent.trim() && node.checkVisibility() && !node.disabled)
            .map(node => {
                const below = under(node);
                const [a, b] = [light(over(getComputedStyle(node).color, below)), light(below)];
                return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), node.outerHTML];
            }).filter(([ratio]) => ratio < 4.5);
    })()""")
    assert ratios == []
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(20, 24, 29)") == dark
    small = """[...document.querySelectorAll("button, input[type=range], input[type=number]")]
        .filter(one => one.checkVisibility() && one.getBoundingClientRect().height < 24).length"""
    assert browser.run(small) == 0
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000
