"""Describes a result's predictions and numbers in words."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mtp_lightning.markdown import plain
from sweeps.report.metrics import BY_TAG, number, p_value

_RATES = re.compile(
    r"accuracy|acceptance(?!_slope)|agreement|overlap|exact_match|rejection|recall|floor|gap_depth"
)

Entry = Mapping[str, Any]  # one of a result's predictions


def subject(entry: Entry) -> str:
    """``parallel − next_token``, or the arm alone."""
    sign = "/" if entry["measure"].get("curve") else "−"
    against = "" if entry["against"] is None else f" {sign} {entry['against']}"
    return f"{entry['arm']}{against}"


def quantity(measure: Entry) -> str:
    """A measure in words: ``share of seeds with val/exact_match > 0.95``."""
    if measure.get("curve"):
        what = "what a step is worth in plain steps" if measure["part"] == "effect" else "gain"
        return f"compute-equivalent {what}, by {measure['tag']}"
    if measure["solved"] is not None:
        return f"share of seeds with {measure['tag']} > {measure['solved']:g}"
    if measure["last"] is not None:
        return f"{measure['tag']}, mean over the last {measure['last']:.0%} of the run"
    return str(measure["tag"])


def predicted(entry: Entry) -> str:
    """``above 0`` or ``within ±0.01``, followed by the expected size."""
    by = _brief(entry, entry["by"])
    region = f"within ±{by}" if entry["side"] == "within" else f"{entry['side']} {by}"
    size = entry["expected"]
    return region if size is None else f"{region}, expected {_brief(entry, size)}"


def measured(entry: Entry) -> str:
    """The effect with its interval, or the two shares."""
    if entry["effect"] is None:
        return "no numbers yet"
    shares = [share(entry[name]) for name in ("own", "other") if entry[name] is not None]
    if shares:
        return " against ".join(shares)
    effect = show(entry, entry["effect"])
    if entry["low"] is None:
        return f"{effect}, one seed"
    low, high = (show(entry, entry[name]) for name in ("low", "high"))
    return f"{effect} [{low}, {high}]"


def share(found: Entry) -> str:
    """``3 of 5 seeds [15 %, 95 %]``."""
    low, high = (f"{found[name]:.0%}".replace("%", " %") for name in ("low", "high"))
    return f"{found['count']} of {found['n']} seeds [{low}, {high}]"


def tested(entry: Entry) -> str:
    """``paired t, n = 5, p = 0.03 (Holm 0.06)``."""
    if entry["test"] is None:
        return ""
    text = f"{entry['test']}, n = {entry['n']}"
    if entry["p"] is None:
        return text
    return f"{text}, p {_equals(entry['p'])} (Holm {p_value(entry['adjusted'])})"


def verdict(entry: Entry, more: str = "") -> str:
    """The verdict in Markdown, followed by the reason of an undecided one and what would help."""
    said = "; ".join(filter(None, [entry["why"], more]))
    return f"**{plain(entry['verdict'])}**" + (f": {plain(said)}" if said else "")


def show(entry: Entry, value: float) -> str:
    """A value in the unit of what the prediction measures; a difference with its sign."""
    tag = entry["measure"]["tag"]
    if entry["measure"].get("curve"):
        return f"{value:.3f} ×"
    form: str | int = BY_TAG[tag].form if tag in BY_TAG else 4
    text = number(value, "%" if _is_rate(entry) else form).replace("-", "−")
    return f"+{text}" if entry["against"] is not None and value >= 0 else text


def aligned(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> list[str]:
    """A table as lines of text with aligned columns, cut at the terminal's width.

    Args:
        head: the columns' names.
        rows: lists of cells.
        right: right-aligned columns, from 0.
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    wide = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    shown = []
    for line in lines:
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in pairs]
        text = "  ".join(cells).rstrip()
        shown.append(text if wide is None or len(text) <= wide else f"{text[: wide - 1]}…")
    return shown


def _brief(entry: Entry, value: float) -> str:
    """A number as in the claim's file; in percent for a rate."""
    text = f"{100 * value:g} %" if _is_rate(entry) and value else f"{value:g}"
    return text.replace("-", "−")


def _is_rate(entry: Entry) -> bool:
    measure = entry["measure"]
    return measure["solved"] is not None or _RATES.search(measure["tag"]) is not None


def _equals(p: float) -> str:
    text = p_value(p)
    return text if text.startswith("<") else f"= {text}"


def beside(here: Entry, committed: Entry) -> list[str]:
    """One line per prediction: both numbers with their 95 % intervals, and whether these overlap.
    For two shares, the intervals of both arms must overlap.

    Args:
        here: the result of the user's runs.
        committed: the stored result of the same claim.
    """
    return [
        f"{subject(mine)}, {quantity(mine['measure'])}: here {measured(mine)}, "
        f"committed {measured(theirs)}: {_agreement(mine, theirs)}"
        for mine, theirs in zip(here["predictions"], committed["predictions"], strict=True)
    ]


def _agreement(mine: Entry, theirs: Entry) -> str:
    pairs = list(zip(_intervals(mine), _intervals(theirs), strict=False))
    if not pairs:
        return "not to be compared yet"
    overlap = all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs)
    return "they agree" if overlap else "they do not agree"


def _intervals(entry: Entry) -> list[Entry]:
    """The intervals of an entry: its shares or its effect. One seed has no interval."""
    found = [entry[name] for name in ("own", "other") if entry[name]] or [entry]
    return [each for each in found if each["low"] is not None]
