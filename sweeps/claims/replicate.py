"""A claim run anew, and what came out beside what the committed result says."""

from __future__ import annotations

from sweeps.claims import words
from sweeps.claims.result import Result
from sweeps.claims.words import Entry


def beside(here: Result, committed: Result) -> list[str]:
    """A line a prediction: both numbers with their 95 % intervals, and whether these overlap.

    Args:
        here: of runs of one's own.
        committed: of the same claim.
    """
    return [
        f"{words.subject(mine)}, {words.quantity(mine['measure'])}: here {words.measured(mine)}, "
        f"committed {words.measured(theirs)}: {_agreement(mine, theirs)}"
        for mine, theirs in zip(here["predictions"], committed["predictions"], strict=True)
    ]


def _agreement(mine: Entry, theirs: Entry) -> str:
    here, there = _interval(mine), _interval(theirs)
    if here is None or there is None:
        return "not to be compared yet"
    return "they agree" if here[0] <= there[1] and there[0] <= here[1] else "they do not agree"


def _interval(entry: Entry) -> tuple[float, float] | None:
    """Of the effect, of two shares that of the arm's own; one seed is a point."""
    if entry["effect"] is None:
        return None
    found = entry["own"] or entry
    point = float(entry["effect"])
    if found["low"] is None:
        return point, point
    return float(found["low"]), float(found["high"])
