"""A claim run anew, and what came out beside what the committed result says."""

from __future__ import annotations

from sweeps.claims import words
from sweeps.claims.result import Result
from sweeps.claims.words import Entry


def beside(here: Result, committed: Result) -> list[str]:
    """A line a prediction: both numbers with their 95 % intervals, and whether these overlap; of
    two shares those of the arm, and of what it is compared with.

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
    pairs = list(zip(_intervals(mine), _intervals(theirs), strict=False))
    if not pairs:
        return "not to be compared yet"
    overlap = all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs)
    return "they agree" if overlap else "they do not agree"


def _intervals(entry: Entry) -> list[Entry]:
    """What has ``low`` and ``high``: the effect, or the shares. One seed has no interval."""
    found = [entry[name] for name in ("own", "other") if entry[name]] or [entry]
    return [each for each in found if each["low"] is not None]
