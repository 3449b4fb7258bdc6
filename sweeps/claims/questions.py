"""Collects the facts that answer the README's three questions; ``questions.jinja`` has the words.

What is a module worth (compute-equivalent gain by size), does it teach to plan (share of seeds by
head), and how much faster does a real model write (tokens per second of SmolLM2-135M)? An undecided
number says so, with its finished and its planned seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.claims import words
from sweeps.claims.claim import Claim
from sweeps.claims.decide import UNDECIDED
from sweeps.claims.figure import files_of
from sweeps.claims.result import Result, is_stale

# Size -> its claims; the first with numbers is shown.
SIZES = {
    "0.2 M": ("equivalent_gain_200k_long", "equivalent_gain_200k"),
    "0.6 M": ("equivalent_gain_600k",),
    "2 M": ("equivalent_gain_2m",),
}
# Groups of claims about the star graph; the first group with numbers is shown.
PLANNING = (("planning_seeds",), ("star_graph_heads_5000", "star_graph_summaries"))
# One file per processor, written by benchmarks.pretrained_heads.
SPEED = "benchmarks/results/pretrained_heads*.json"
WAYS = (
    "drafts_1",
    "drafts_1_of_4096",
)  # one draft per pass, from all tokens or the 4096 most frequent

Found = Mapping[str, tuple[Claim, Result | None]]


def questions(found: Sequence[tuple[Claim, Result | None]], root: Path) -> dict[str, Any]:
    """The facts of all three questions; None for one without any.

    Args:
        found: claims with their results.
        root: has ``results/`` and ``benchmarks/results/``.
    """
    by_name = {claim.name: (claim, result) for claim, result in found if claim.setting == "cpu"}
    return {"worth": _worth(by_name), "plans": _plans(by_name), "speed": _speeds(root)}


def _worth(found: Found) -> dict[str, Any] | None:
    """Every head's gain by size, or the command that would measure it."""
    sizes: list[dict[str, Any]] = []
    figure = None
    for size, claims in SIZES.items():
        there = [name for name in claims if name in found]
        claim, result = next(
            (found[name] for name in there if _has_numbers(*found[name])),
            found[there[0]] if there else (None, None),
        )
        if claim is None:
            continue
        heads = list(_heads(claim, result)) if _has_numbers(claim, result) else []
        sizes.append({"size": size, "heads": heads, "command": claim.command})
        if heads and result is not None:
            figure = files_of(result, claim.label, Path("results"))[0].as_posix()
    return {"sizes": sizes, "figure": figure} if sizes else None


def _heads(claim: Claim, result: Result | None) -> Iterator[str]:
    """``parallel 0.777 × (undecided, 1 seed of 5)`` for each arm whose gain is predicted."""
    assert result is not None
    for entry in result["predictions"]:
        measure = entry["measure"]
        if measure.get("curve") and measure["part"] == "total" and entry["against"] is None:
            if entry["effect"] is None:
                number = "out of range" if "out of range" in entry["why"] else "no number"
            elif entry["low"] is None:  # of one seed, as the parenthesis says
                number = words.show(entry, entry["effect"])
            else:
                number = words.measured(entry)
            yield f"{entry['arm']} {number} ({_seeds(entry, claim)})"


def _seeds(entry: Mapping[str, Any], claim: Claim) -> str:
    n, planned = entry["n"], len(claim.scale.seeds)
    if entry["verdict"] != UNDECIDED:
        return f"{n} seeds"
    return f"undecided, {n} {'seed' if n == 1 else 'seeds'} of {planned}"


def _plans(found: Found) -> dict[str, Any] | None:
    """Every head's share of seeds that learn the way, with its interval."""
    for group in PLANNING:
        if group[0] not in found or not _has_numbers(*found[group[0]]):
            continue
        arms: dict[str, str] = {}
        figure = None
        for claim, result in (found[name] for name in group if name in found):
            if result is None or is_stale(result, claim):
                continue
            figure = figure or next(iter(files_of(result, claim.label, Path("results"))), None)
            for entry in result["predictions"]:
                for arm, share in (("against", "other"), ("arm", "own")):
                    if entry[share] is not None:
                        arms.setdefault(entry[arm], _share(entry, share, claim))
        if arms:
            return {"arms": arms, "figure": figure.as_posix() if figure else None}
    return None


def _share(entry: Mapping[str, Any], which: str, claim: Claim) -> str:
    share, planned = entry[which], len(claim.scale.seeds)
    left = f", {planned} planned" if share["n"] < planned else ""
    return f"{words.share(share)}{left}"


def _has_numbers(claim: Claim, result: Result | None) -> bool:
    if result is None or is_stale(result, claim):
        return False
    return any(entry["effect"] is not None for entry in result["predictions"])


def _speeds(root: Path) -> list[dict[str, Any]] | None:
    """Speed of greedy decoding with drafts by processor and kind of text: the ratio to plain
    decoding, and tokens per second where they are stored. Each processor shows the way of drafting
    with the best mean ratio."""
    found = []
    for file in sorted(root.glob(SPEED)):
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = [row for row in content["rows"] if row["temperature"] == 0]
        ways = [way for way in WAYS if all(way in row for row in rows)]
        if not rows or not ways:
            continue
        best = max(ways, key=lambda way: sum(row[way]["over_plain"] for row in rows))
        texts = [
            {
                "kind": row["kind"],
                "ratio": row[best]["over_plain"],
                "plain": row.get("plain", {}).get("tokens_per_second"),
                "drafted": row[best].get("tokens_per_second"),
                "llama_cpp": row.get("llama.cpp", {}).get("tokens_per_second"),
                "tokens": row["tokens"],
            }
            for row in rows
        ]
        found.append({"processor": content.get("processor", "one processor"), "texts": texts})
    return found or None
