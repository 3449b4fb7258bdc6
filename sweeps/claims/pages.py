"""Writes the text between the markers of docs/results.md and the READMEs from ``results/*.json``.

This file collects the facts; ``results.jinja``, ``questions.jinja`` and ``readme*.jinja`` have the
words. An undecided number says so, with its finished and its planned seeds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError, counted
from mtp_lightning.markdown import plain
from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.stored import read_json
from sweeps.claims import words
from sweeps.claims.claim import CPU, Claim, Stored, is_stale
from sweeps.claims.decide import FAILS, HOLDS, UNDECIDED
from sweeps.claims.figure import caption, files_of, seeds_and_size
from sweeps.claims.power import seeds_needed
from sweeps.claims.read import FOLDER, names, read_claim
from sweeps.claims.result import Result, in_order, read_result, state
from sweeps.report import environment, require_packages
from sweeps.report.names import name_of

BEGIN, END = "<!-- claims: made by python -m sweeps.claims verdict --all -->", "<!-- /claims -->"
READMES = {"README.md": "readme.jinja", "README.zh-CN.md": "readme.zh-CN.jinja"}

# Groups of claims about the star graph; the first group with numbers is shown.
PLANNING, MORE_PLANNING = "star_graph_heads_5000", "star_graph_summaries"
_PLANNING = ("planning_seeds", PLANNING, MORE_PLANNING)  # the first of several counts of a head
# Size -> its claims of compute-equivalent gain; the first with numbers is shown.
_SIZES = {
    "0.2 M": ("equivalent_gain_200k_long", "equivalent_gain_200k"),
    "0.6 M": ("equivalent_gain_600k",),
    "2 M": ("equivalent_gain_2m",),
}
# The claims that divide the gains of two sizes.
_GROWTH = ("gain_growth_600k",)
# The results of benchmarks.pretrained_heads, and their ways of drafting one token per pass: from
# all tokens, or from the 4096 most frequent.
_SPEED = "benchmarks/results/pretrained_heads*.json"
_WAYS = ("drafts_1", "drafts_1_of_4096")
# The way that looks drafts up in the text as well.
_LOOKUP = "drafts_of_both"
# The key of a ratio's interval; the questions show no ratio without one.
_INTERVAL = "over_plain_cpu_interval"

Pair = tuple[Claim, Result | None]


def write_pages(root: Path, claims: Path = FOLDER, **options: Any) -> list[Path]:
    """Replace the text between the markers of the pages, and return the changed pages.

    Args:
        root: has ``results/``, ``docs/results.md``, ``README.md`` and perhaps its translations.
        claims: the folder of the claims.
        options: other arguments of :func:`read_claim`.

    Raises:
        OSError: a page is missing.
        UserError: a page has no markers, or a package is missing.
    """
    changed = []
    for page, text in pages(root, claims, **options).items():
        if page.read_text(encoding="utf-8") != text:
            write_bytes(text.encode(), page)
            changed.append(page)
    return changed


def pages(root: Path, claims: Path = FOLDER, **options: Any) -> dict[Path, str]:
    """The pages' new texts; arguments and errors as in :func:`write_pages`."""
    pairs = pairs_of(root, claims, **options)
    texts = {root / "docs" / "results.md": _render("results.jinja", _results(pairs, root))}
    for name in READMES:
        if name == "README.md" or (root / name).exists():
            texts[root / name] = part(pairs, name, root)
    return {page: _between(page, text) for page, text in texts.items()}


def answers(pairs: Sequence[Pair], root: Path) -> str:
    """The answers to the three questions, as README.md has them: what a module is worth, whether it
    teaches to plan, and how much faster a real model decodes."""
    return _render("questions.jinja", _answers(pairs, root))


def part(pairs: Sequence[Pair], name: str, root: Path) -> str:
    """The text between the markers of the README of that file name."""
    return _render(READMES[name], {**_answers(pairs, root), **_counts(pairs)})


def pairs_of(root: Path, claims: Path = FOLDER, **options: Any) -> list[Pair]:
    """All claims at all scales with their results; arguments and errors as in
    :func:`write_pages`."""
    require_packages("a page of claims")
    loaded = [read_claim(name, claims, **options) for name in names(claims)]
    scaled_claims = [scale for claim in loaded for scale in claim.scales]
    return [(claim, read_result(claim.label, root / "results")) for claim in scaled_claims]


def _by_name(pairs: Sequence[Pair]) -> dict[str, Pair]:
    return {claim.name: (claim, result) for claim, result in pairs if claim.setting == CPU}


def _render(template: str, facts: Mapping[str, Any]) -> str:
    templates = environment("sweeps.claims")
    templates.filters["plain"] = plain
    text = templates.get_template(template).render(words=words, counted=counted, **facts)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _between(page: Path, text: str) -> str:
    old = page.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(END) < old.index(BEGIN):
        raise UserError(f"{page} needs the lines {BEGIN} and {END}, once and in this order.")
    start, end = old.index(BEGIN) + len(BEGIN), old.index(END)
    return f"{old[:start]}\n\n{text}\n\n{old[end:]}"


def _results(pairs: Sequence[Pair], root: Path) -> dict[str, Any]:
    """The facts of the page of results, decided claims first."""
    by_label = {claim.label: result for claim, result in pairs if result is not None}
    order = {claim.label: i for i, claim in enumerate(in_order([c for c, _ in pairs], by_label))}
    # The sort is stable: a claim's published scale stays after the claim.
    ordered = sorted(pairs, key=lambda pair: order[pair[0].name])
    sections = [_facts(claim, result) for claim, result in ordered]
    on_cpu = [section for section in sections if section["claim"].setting == CPU]
    return {
        "lossless": lossless(root),
        "sections": sections,
        "run": [section for section in on_cpu if section["result"] is not None],
        "missing": [section["claim"].name for section in on_cpu if section["result"] is None],
    }


def lossless(root: Path) -> dict[str, Any] | None:
    """The verdict over all certificates of ``results/certificates`` (``mtp-lightning certify``),
    with the texts of each and of the other programs in it; None if there are none. The claim holds
    if no certificate has a broken promise."""
    rows, others, holds = [], [], True
    for file in sorted((root / "results" / "certificates").glob("*.json")):
        content = read_json(file)
        cells, samples = content["cells"], [c["p"] for c in content["cells"] if "p" in c]
        holds = holds and not content["broken"]
        rows.append(
            {
                "file": file.name,
                "model": content["model"],
                "processor": content["processor"],
                "weights": list(dict.fromkeys(cell["weights"] for cell in cells)),
                "cells": len(cells),
                "texts": sum(cell["texts"] for cell in cells),
                "texts_equal": sum(cell["texts_equal"] for cell in cells),
                "tokens": sum(cell["tokens"] for cell in cells),
                "logits_equal": sum(cell["logits_equal"] for cell in cells),
                "samples": len(samples),
                "least_p": min(samples, default=None),
            }
        )
        others += [{"processor": content["processor"], **count} for count in content["others"]]
    if not rows:
        return None
    return {"state": HOLDS if holds else FAILS, "rows": rows, "others": others}


def _anchor(claim: Claim, result: Result) -> str:
    """The anchor of a claim's section in docs/results.md, whose title ends in the verdict."""
    verdict = re.sub("[^a-z0-9_ ]", "", state(claim, result))
    return f"{claim.name}-{verdict.replace(' ', '-')}"


def _facts(claim: Claim, result: Result | None) -> dict[str, Any]:
    """The facts of one claim."""
    facts: dict[str, Any] = {"claim": claim, "result": result, "state": state(claim, result)}
    if result is None:
        return facts | {"predictions": words.entries(claim)}
    needed = seeds_needed(result["predictions"], claim.scale.minimum)
    advice = ["" if n is None else f"about {n} seeds per arm would decide it" for n in needed]
    names = words.names_in(result)
    arms = {names[name]: arm for name, arm in result["arms"].items()}
    n_done = [sum(run["state"] == "done" for run in arm["seeds"].values()) for arm in arms.values()]
    files = files_of(result, claim.label, Path())
    return facts | {
        "stale": is_stale(result, claim),
        "files": [(file.name, caption(result, file)) for file in files],
        "entries": list(zip(words.entries(result), advice, strict=True)),
        "held": [entry["verdict"] for entry in result["predictions"]].count(HOLDS),
        # The fewest and the most finished seeds of an arm.
        "n": "–".join(dict.fromkeys(map(str, (min(n_done), max(n_done))))),
        "anchor": _anchor(claim, result),
        "medians": [
            f"{name} not by {max(times['times']):g}"
            if times["median_steps"] is None
            else f"{name} {times['median_steps']:g}"
            for name, arm in arms.items()
            for times in arm["time_to_solve"].values()
        ],
    }


def _answers(pairs: Sequence[Pair], root: Path) -> dict[str, Any]:
    """The facts of the three questions."""
    by_name = _by_name(pairs)
    return {"worth": _worth(by_name), "plans": _plans(by_name), "speed": _speeds(root)}


def _counts(pairs: Sequence[Pair]) -> dict[str, Any]:
    """How many claims hold that were predicted before their runs, and how many predictions."""
    results = _by_name(pairs).values()
    predicted = [(claim, r) for claim, r in results if r is not None and r["predicted_in"]]
    run = [state(claim, result) for claim, result in predicted]
    holds, fails = (sum(word.startswith(verdict) for word in run) for verdict in (HOLDS, FAILS))
    counts = {"all": len(run), "holds": holds, "fails": fails, "open": len(run) - holds - fails}
    entries = [entry for _, result in predicted for entry in result["predictions"]]
    return {
        "counts": counts if run else None,
        "predictions": Counter(entry["verdict"] for entry in entries),
        "missing": sum(result is None for _, result in results),
    }


def _measured(by_name: Mapping[str, Pair], claims: Sequence[str]) -> list[tuple[Claim, Result]]:
    """Those of some claims that have numbers and were not changed since."""
    pairs = (by_name[name] for name in claims if name in by_name)
    current = [(c, result) for c, result in pairs if result is not None and not is_stale(result, c)]
    return [(c, r) for c, r in current if any(e["effect"] is not None for e in r["predictions"])]


def _worth(by_name: Mapping[str, Pair]) -> dict[str, Any] | None:
    """Every head's gain and effect by size, where they were measured. Claims with enough seeds give
    the answers and the picture."""
    sizes: dict[str, dict[str, dict[str, Any]]] = {}
    unmeasured, picture = [], None
    answers: dict[str, list[str]] = {}  # sizes by the side of 1 on which all heads' gains are
    for size, claims in _SIZES.items():
        measured = _measured(by_name, claims)
        if not measured:
            unmeasured += [size] if by_name.keys() & {*claims} else []
            continue
        claim, result = measured[0]
        heads = sizes[size] = {}
        enough = max(e["n"] for e in result["predictions"]) >= claim.scale.minimum
        gains: set[str] = set()
        for entry in words.entries(result):
            if entry["measure"].get("curve") and entry["against"] is None:
                heads.setdefault(entry["arm"], {})[entry["measure"]["part"]] = {
                    "number": _number(entry),
                    "out_of_range": "out of range" in entry["why"],
                    "n": entry["n"],
                    "planned": len(claim.scale.seeds),
                }
                if entry["measure"]["part"] == "total":
                    side, other = entry["side"], "above" if entry["side"] == "below" else "below"
                    gains.add({HOLDS: side, FAILS: other}.get(entry["verdict"], UNDECIDED))
        if enough:
            answers.setdefault(gains.pop() if len(gains) == 1 else "mixed", []).append(size)
        if enough or picture is None:
            seeds, parameters = seeds_and_size(result)
            file = files_of(result, claim.label, Path())[0].name
            picture = {"file": file, "seeds": seeds, "size": parameters}
    if not sizes:
        return None
    grows = [
        {**entry, "number": _number(entry), "decided": entry["verdict"] != UNDECIDED}
        for claim, result in _measured(by_name, _GROWTH)
        for entry in words.entries(result)
    ]
    return {
        "sizes": sizes,
        "answers": answers,
        "grows": grows,
        "waiting": unmeasured,
        "picture": picture,
    }


def _number(entry: Stored) -> str | None:
    """A gain with its interval; that of one seed has none, and the cell says how many there are."""
    if entry["effect"] is None:
        return None
    return words.show(entry, entry["effect"]) if entry["low"] is None else words.measured(entry)


def _plans(by_name: Mapping[str, Pair]) -> dict[str, Any] | None:
    """Every head's share of seeds that learn the way, and the heads that are beyond noise."""
    plain_name = name_of("mtp", "none")
    arms: dict[str, dict[str, Any]] = {}
    beyond: dict[str, None] = {}  # each once, in this order
    remarked = None
    for claim, result in _measured(by_name, _PLANNING):
        planned = len(claim.scale.seeds)
        for entry in words.entries(result):
            for arm, share in (("against", "other"), ("arm", "own")):
                if entry[share] is not None:
                    arms.setdefault(entry[arm], {**entry[share], "planned": planned})
            # Above the model without a head, or above a level of its own.
            tested = entry["side"] == "above" and entry["against"] in (None, plain_name)
            if entry["own"] and tested and entry["verdict"] == HOLDS:
                beyond[entry["arm"]] = None
        remarked = remarked or (_anchor(claim, result) if claim.remark else None)
    if not arms:
        return None
    plain_first = dict(sorted(arms.items(), key=lambda item: item[0] != plain_name))
    return {"arms": plain_first, "beyond": list(beyond), "remarked": remarked}


def measured_heads(root: Path) -> list[dict[str, Any]]:
    """The results of ``benchmarks.pretrained_heads``: per processor, the head of the most steps."""
    contents = [read_json(file) for file in sorted(root.glob(_SPEED))]
    contents.sort(key=lambda content: content.get("head", {}).get("steps", 0))
    by_processor = {content.get("processor", "one processor"): content for content in contents}
    return [by_processor[name] for name in sorted(by_processor)]


def _speeds(root: Path) -> list[dict[str, Any]] | None:
    """Speed of greedy decoding with drafts by processor and kind of text: the ratio to plain
    decoding with its interval over texts, if it has one. Each processor shows the way of drafting
    with the best mean ratio, and the one with lookups."""
    speeds = []
    for content in measured_heads(root):
        rows = [row for row in content["rows"] if row["temperature"] == 0]
        complete = {w for w in (*_WAYS, _LOOKUP) if all(_INTERVAL in r.get(w, {}) for r in rows)}
        ways = [way for way in _WAYS if way in complete]
        if not rows or not ways:
            continue
        best = max(ways, key=lambda way: sum(row[way]["over_plain_cpu"] for row in rows))
        processor, options = content.get("processor", "one processor"), content.get("options", {})
        labels = {best: processor}
        if _LOOKUP in complete:
            labels[_LOOKUP] = f"{processor}, lookup={options['lookup']}"
        # Texts of each kind, all of which have the same length.
        n = rows[0]["tokens"] // options.get("new_tokens", 64)
        for way, label in labels.items():
            texts = [{"kind": row["kind"], **row[way]} for row in rows]
            speeds.append({"processor": label, "texts": texts, "n": n, "head": content.get("head")})
    return speeds or None
