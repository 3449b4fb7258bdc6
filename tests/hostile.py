"""Data in which every string is markup, and a parser that finds unescaped markup in a page."""

from __future__ import annotations

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from tests.sweeps.fixture_runs import VERSIONS, task_run, write_plan, write_run

# Each leaves some place of a page: a text, an attribute in either kind of quotes, an element whose
# text is not parsed, a comment, Markdown. Nothing but these has anything called x-hit.
MARKS = (
    "\"'><img src=q onerror=__hit=1 x-hit>",
    "</script><script>__hit=1</script><x-hit>",
    "</title></style><svg onload=__hit=1 x-hit>\x1b[31m",
    "x\" onfocus=__hit=1 autofocus x-hit='\" x-hit='",
    "--><x-hit>]]><x-hit>&lt;x-hit&gt;",
    "[x](javascript:__hit=1) ![x](q){: onclick=__hit=1 x-hit=1 }",
    "| `<x-hit>` ``` *x* _y_ $z$ :::\n\n::: x-hit\n\n<x-hit>\n\n# x",
    "javascript:__hit=1\N{LINE SEPARATOR}//",
)
NAMES = [mark for mark in MARKS if "/" not in mark and "\n" not in mark]  # of files


class Page(HTMLParser):
    """A page as a browser reads it.

    Attributes:
        tags: the number of elements of each name.
        texts: all text, with that of scripts and styles.
        images: the addresses of images.
        wrong: elements and attributes that come from data or can run.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.texts = ""
        self.images: list[str] = []
        self.wrong: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        if tag in ("x-hit", "iframe", "object", "embed", "base", "form"):
            self.wrong.append(tag)
        for name, value in attrs:
            target = (value or "").strip().lower()
            loads = name in ("href", "src", "xlink:href", "action") and (
                target.startswith(("javascript:", "data:text", "http", "//")) or target == "q"
            )
            if tag == "img" and name == "src":
                self.images.append(value or "")
            if loads or name == "x-hit" or name.startswith("on"):
                self.wrong.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.texts += data


def marked(value: Any, first: int) -> Any:
    """The value with a mark in the place of every string, and another next to every key."""
    at = iter(range(first, first + 10_000))

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            marked_items = {key: walk(inner) for key, inner in node.items()}
            return {**marked_items, MARKS[next(at) % len(MARKS)]: MARKS[next(at) % len(MARKS)]}
        if isinstance(node, list):
            return [walk(inner) for inner in node]
        return MARKS[next(at) % len(MARKS)] if isinstance(node, str) else node

    return walk(value)


def _mark(folder: Path, first: int) -> None:
    """Replace every string of a run's files by a mark."""
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(marked(yaml.safe_load(config.read_text()), first)))
    summary = folder / "summary.json"
    if summary.exists():
        stored = marked(json.loads(summary.read_text()), first)
        # One text, or there would be nothing to compare.
        stored["evaluation"] = {"fingerprint": MARKS[0], "documents": 1, "bytes": 9, "tokens": 3}
        summary.write_text(json.dumps(stored))


def sweep(folder: Path, *, task: bool = False) -> Path:
    """A sweep in which every string is a mark: names, keys, values, reasons, versions, tags."""
    name = iter(f"{number} {mark}" for number, mark in enumerate(NAMES * 9))
    jobs: dict[str, list[str]] = {}
    for number in range(8):
        which = number // 4  # of two kinds, each a grid
        mark = MARKS[which]
        for seed in (0, 1):
            grid = {"mtp.depth": 1 + number % 2, "mtp_lambda": 0.1 + number // 2 % 2}
            keys = {**grid, "seed": seed, MARKS[0]: mark}
            loss = 2.0 + 0.1 * number + 0.01 * (seed + 1) * number
            summary = {
                "val/loss_depth_1": loss,
                "val/agreement_depth_1": 0.5,
                "val/accuracy_place_4": 0.5,
                f"val/{MARKS[0]}/exact_match": 0.5,
                "decode/speedup": 1.5,
                "decode/tokens_per_step": 1.5,
                "decode/tokens_per_second": 90.0,
                "mtp_reads_tokens": bool(number % 2),
                "versions": {**VERSIONS, MARKS[2]: mark},
            }
            at = folder / next(name)
            if task:
                task_run(at, keys, rights=(0.5, 1.0), summary=summary, curve=())
            else:
                write_run(at, keys, loss=loss, summary=summary)
            _mark(at, which)
            jobs[at.name] = [f"{key}={value}" for key, value in keys.items()]
    for number, state in enumerate(("failed", "interrupted", "running")):
        at = folder / next(name)
        overrides = [f"{mark}={mark}" for mark in MARKS]
        status = {"state": state, "reason": MARKS[number], "overrides": overrides}
        write_run(at, {MARKS[0]: MARKS[number], "seed": 9}, status=status, done=False)
        _mark(at, number)
        (at / "job.log").write_text(MARKS[number])
    script = folder / "javascript:__hit=1"
    write_run(script, status={"state": "failed", "reason": "x"}, done=False)
    (script / "job.log").touch()
    jobs.update({mark: [f"{mark}={mark}"] for mark in NAMES})
    write_plan(folder, jobs)
    return folder


def small_sweep(folder: Path) -> Path:
    """Two settings of two seeds."""
    for number, mark in enumerate(MARKS[:2]):
        for seed in (0, 1):
            at = folder / f"{number}{seed}{NAMES[number]}"
            write_run(at, {MARKS[0]: mark, "seed": seed}, loss=2.0 + number + 0.01 * seed)
    return folder
