"""Tables for the terminal: all claims, their pending runs, and a plan of what fits into a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from sweeps.claims.claim import Claim
from sweeps.claims.decide import UNDECIDED
from sweeps.claims.enough import seeds_enough
from sweeps.claims.hours import Left, command_of, fitting, left_of
from sweeps.claims.result import Result, in_order, is_stale, state
from sweeps.claims.words import aligned


def listing(claims: Sequence[Claim], results: Mapping[str, Result], runs: Path) -> list[str]:
    """One line per claim, decided claims first."""
    rows = []
    for left in left_of(in_order(claims, results), runs, results, count_flops=False):
        claim, result = left.claim, results.get(left.claim.label)
        entries = [] if result is None or is_stale(result, claim) else result["predictions"]
        said = state(claim, result)
        enough: list[int | None] = []
        if said.startswith(UNDECIDED) and importlib.util.find_spec("scipy") is not None:
            enough = seeds_enough(entries, claim.scale.minimum)
        rows.append(
            [
                claim.label,
                f"{sum(e['verdict'] != UNDECIDED for e in entries)}/{len(claim.predictions)}",
                said,
                f"{left.done}/{len(claim.arms) * len(claim.scale.seeds)}",
                str(max((n for n in enough if n is not None), default="")),
                f"{left.hours:.1f}" if left.costs else "",
                claim.sentence,
            ]
        )
    head = ["claim", "decided", "verdict", "runs", "seeds to decide", "hours left", "claimed"]
    return aligned(head, rows, right=(1, 3, 4, 5))


def costs(left: Sequence[Left]) -> list[str]:
    """The pending runs of every claim, and their sum."""
    rows = [
        [each.claim.label, str(len(each.costs)), f"{each.hours:.2f}", each.sources()]
        for each in left
    ]
    runs, hours = sum(len(each.costs) for each in left), sum(each.hours for each in left)
    rows.append(["all", str(runs), f"{hours:.2f}", ""])
    return aligned(["claim", "runs left", "core-hours", "from"], rows, right=(1, 2))


def planned(left: Sequence[Left], *, hours: float, cores: int) -> list[str]:
    """The seeds that fit into a time, and the commands that run them."""
    chosen = fitting(left, hours=hours, cores=cores)
    rows = [
        [
            each.claim.label,
            " ".join(map(str, seeds)),
            f"{len(seeds)} of {len(each.seeds)}",
            f"{sum(cost.hours for cost in each.costs if cost.seed in seeds):.2f}",
        ]
        for each, seeds in chosen
    ]
    title = f"In {hours:g} hours, {cores} at once:"
    if not rows:
        return [f"{title} not one seed fits."]
    table = aligned(["claim", "seeds", "of those left", "core-hours"], rows, right=(2, 3))
    return [title, "", *table, "", *(command_of(e, seeds, cores=cores) for e, seeds in chosen)]
