"""Writes the text between the markers of docs/results.md and the READMEs from ``results/*.json``.

This file collects the facts; ``results.jinja`` and ``readme*.jinja`` have the words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.markdown import plain
from mtp_lightning.run.atomic import write_bytes
from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.decide import FAILS, HOLDS, UNDECIDED
from sweeps.claims.enough import said, seeds_enough
from sweeps.claims.figure import CURVE, files_of
from sweeps.claims.questions import questions
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.result import Result, in_order, is_stale, read_result, state

BEGIN, END = "<!-- claims: made by python -m sweeps.claims verdict --all -->", "<!-- /claims -->"
READMES = {"README.md": "readme.jinja", "README.zh-CN.md": "readme.zh-CN.jinja"}

# The claims of the README's answers: quality at equal compute, and planning.
QUESTION = "text_equal_flops"
PLANNING = "star_graph_heads_5000"
# Further heads on the same task, against the same control.
MORE_PLANNING = "star_graph_summaries"
# Its picture is shown while QUESTION has no numbers.
INSTEAD = "drafts_best"

Found = Sequence[tuple[Claim, Result | None]]


def write_pages(root: Path, claims: Path = FOLDER) -> list[Path]:
    """Replace the text between the markers of the pages.

    Args:
        root: has ``results/``, ``docs/results.md``, ``README.md`` and perhaps its translations.
        claims: the folder of the claims' files.

    Returns:
        The changed pages.

    Raises:
        OSError: a page is missing.
        UserError: a page has no markers, or a package is missing.
    """
    changed = []
    for page, text in pages(root, claims).items():
        if page.read_text(encoding="utf-8") != text:
            write_bytes(text.encode(), page)
            changed.append(page)
    return changed


def pages(root: Path, claims: Path = FOLDER) -> dict[Path, str]:
    """The pages' new texts; arguments and errors as in :func:`write_pages`."""
    found = _found(root, claims)
    facts = {**_results(found), "questions": answers(found, root, to="../")}
    texts = {root / "docs" / "results.md": _render("results.jinja", facts)}
    for name in READMES:
        if name == "README.md" or (root / name).exists():
            texts[root / name] = part(found, name, root)
    return {page: _between(page, text) for page, text in texts.items()}


def _found(root: Path, claims: Path) -> Found:
    read = [read_claim(name, claims) for name in names(claims)]
    # A claim with a published scale comes twice, at both scales.
    every = [at for claim in read for at in [claim, *([claim.on_gpu()] if claim.gpu else [])]]
    return [(claim, read_result(claim.label, root / "results")) for claim in every]


def block(root: Path, claims: Path = FOLDER) -> str:
    """The answers to the three questions for a page in the checkout's root, such as README.md."""
    return answers(_found(root, claims), root)


def answers(found: Found, root: Path, *, to: str = "") -> str:
    """The answers to the three questions of :mod:`sweeps.claims.questions`, in Markdown.

    Args:
        found: claims with their results.
        root: has ``results/`` and ``benchmarks/``.
        to: the path from the page to the root.
    """
    return _render("questions.jinja", {**questions(found, root), "to": to})


def part(found: Found, name: str, root: Path) -> str:
    """The text between the markers of a README.

    Args:
        found: claims with their results.
        name: the README's file name.
        root: has ``results/`` and ``benchmarks/``.
    """
    speed = questions(found, root)["speed"]
    return _render(READMES[name], {**_readme(found), "speed": speed})


def _render(template: str, facts: Mapping[str, Any]) -> str:
    from sweeps.report.templates import environment

    made = environment("sweeps.claims")
    made.filters["plain"] = lambda text: plain(str(text))
    text = made.get_template(template).render(words=words, **facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _between(page: Path, text: str) -> str:
    whole = page.read_text(encoding="utf-8")
    if whole.count(BEGIN) != 1 or whole.count(END) != 1 or whole.index(END) < whole.index(BEGIN):
        raise UserError(f"{page} needs the lines {BEGIN} and {END}, once and in this order.")
    start, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    return f"{whole[:start]}\n\n{text}\n\n{whole[end:]}"


def _results(found: Found) -> dict[str, Any]:
    """The facts of the page of results, decided claims first."""
    by_label = {claim.label: result for claim, result in found if result is not None}
    order = {claim.label: i for i, claim in enumerate(in_order([c for c, _ in found], by_label))}
    # The sort is stable: a claim's published scale stays after the claim.
    ordered = sorted(found, key=lambda pair: order[pair[0].name])
    sections = [_facts(claim, result) for claim, result in ordered]
    shown = [one for one in sections if one["claim"].setting == "cpu"]
    return {
        "sections": sections,
        "run": [one for one in shown if one["result"] is not None],
        "missing": [one["claim"].name for one in shown if one["result"] is None],
    }


def _facts(claim: Claim, result: Result | None) -> dict[str, Any]:
    """The facts of one claim."""
    equal = {"flops": "At equal FLOPs. ", "nothing": ""}.get(
        claim.equal, f"At equal {claim.equal}. "
    )
    facts: dict[str, Any] = {"claim": claim, "result": result, "state": state(claim, result)}
    facts |= {"equal": equal, "predictions": [asdict(p) for p in claim.predictions]}
    if result is None:
        return facts
    more = map(said, seeds_enough(result["predictions"], claim.scale.minimum))
    done = [
        sum(seed["state"] == "done" for seed in arm["seeds"].values())
        for arm in result["arms"].values()
    ]
    return facts | {
        "stale": is_stale(result, claim),
        "files": files_of(result, claim.label, Path()),
        "entries": list(zip(result["predictions"], more, strict=True)),
        "held": [entry["verdict"] for entry in result["predictions"]].count(HOLDS),
        # The fewest and the most finished seeds of an arm.
        "n": "–".join(dict.fromkeys(map(str, (min(done), max(done))))),
        # The anchor of the claim's section, whose title ends in the verdict.
        "anchor": f"{claim.name}-{re.sub('[^a-z0-9_ ]', '', facts['state']).replace(' ', '-')}",
        "medians": [
            f"{arm} never" if steps is None else f"{arm} {steps:g}"
            for arm, content in result["arms"].items()
            for steps in (times["median_steps"] for times in content["time_to_solve"].values())
        ],
    }


def _readme(found: Found) -> dict[str, Any]:
    """The facts of a README: its answers, its pictures, and how many claims hold."""
    on_cpu = {claim.name: (claim, result) for claim, result in found if claim.setting == "cpu"}
    old = [name for name, (claim, _) in on_cpu.items() if claim.superseded_by]
    shown = {name: pair for name, pair in on_cpu.items() if name not in old}
    run = [state(claim, result) for claim, result in shown.values() if result is not None]
    counts = {
        "all": len(run),
        "holds": sum(word.startswith(HOLDS) for word in run),
        "fails": sum(word.startswith(FAILS) for word in run),
        "open": sum(not word.startswith((HOLDS, FAILS)) for word in run),
    }
    return {
        "question": _question(shown),
        "plans": _solvers((PLANNING, MORE_PLANNING), shown),
        "pictures": list(_pictures(shown)),
        "counts": counts if run else None,
        "missing": [name for name, (_, result) in shown.items() if result is None],
    }


def _question(shown: Mapping[str, tuple[Claim, Result | None]]) -> dict[str, Any] | None:
    """The first answer: counts of verdicts, and the smallest and the largest effect."""
    if QUESTION not in shown:
        return None
    claim, result = shown[QUESTION]
    entries = [] if result is None else [e for e in result["predictions"] if e["low"] is not None]
    if not entries:
        return {"entries": [], "command": claim.command}
    verdicts = [entry["verdict"] for entry in entries]
    by_size = sorted(entries, key=lambda entry: float(entry["effect"]))
    least, most = (plain(f"{words.measured(e)} ({e['arm']})") for e in (by_size[0], by_size[-1]))
    return {
        "entries": entries,
        "state": state(claim, result),
        "worse": verdicts.count(HOLDS),
        "better": verdicts.count(FAILS),
        "open": verdicts.count(UNDECIDED),
        "least": least,
        "most": most,
    }


def _solvers(
    wanted: Sequence[str], shown: Mapping[str, tuple[Claim, Result | None]]
) -> dict[str, Any] | None:
    """Every arm's share of seeds that solved the task; None if the first claim has no numbers."""
    counts: dict[str, Mapping[str, int]] = {}
    beyond: list[str] = []
    for name in wanted:
        claim, result = shown.get(name, (None, None))
        fresh = claim is not None and result is not None and not is_stale(result, claim)
        entries = [e for e in result["predictions"] if e["own"]] if fresh and result else []
        if not any(entry["against"] for entry in entries) and not counts:
            return None
        for entry in entries:
            if entry["other"]:
                counts.setdefault(entry["against"], entry["other"])
            counts[entry["arm"]] = entry["own"]
            if entry["against"] and entry["verdict"] == HOLDS:
                beyond.append(entry["arm"])
    return {"counts": counts, "beyond": beyond}


def _pictures(shown: Mapping[str, tuple[Claim, Result | None]]) -> Any:
    """The first figure with numbers of each group: its file, and what it shows."""
    for group in ({QUESTION: "question", INSTEAD: "drafts"}, {PLANNING: "planning"}):
        for name, kind in group.items():
            claim, result = shown.get(name, (None, None))
            if claim is None or result is None:
                continue
            if files := files_of(result, claim.label, Path("results")):
                file = files[-1] if name == QUESTION else files[0]
                yield file.as_posix(), "curve" if file.stem.endswith(CURVE) else kind
                break
