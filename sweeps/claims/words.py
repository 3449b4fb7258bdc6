"""Describes a result's predictions and numbers in words."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import Any

from mtp_lightning.markdown import plain
from sweeps.claims.claim import Claim, Stored
from sweeps.report.metrics import equals, form_of, number, p_value
from sweeps.report.names import arm_names, in_words


def names_in(result: Stored) -> dict[str, str]:
    """Readable names of a result's arms."""
    return arm_names({arm: content["overrides"] for arm, content in result["arms"].items()})


def entries(source: Stored | Claim) -> list[dict[str, Any]]:
    """The predictions of a result, or of a claim without one, with readable names of arms."""
    if isinstance(source, Claim):
        predictions = [asdict(prediction) for prediction in source.predictions]
        names = arm_names({arm: source.overrides(arm) for arm in source.arms})
    else:
        predictions, names = source["predictions"], names_in(source)
    return [
        {**entry, **{key: names.get(entry[key], entry[key]) for key in ("arm", "against")}}
        for entry in predictions
    ]


def subject(entry: Stored) -> str:
    """``parallel heads, bytes − no MTP``, or the arm alone."""
    sign = "/" if entry["measure"].get("curve") else "−"
    return entry["arm"] + (f" {sign} {other}" if (other := other_of(entry)) else "")


def other_of(entry: Stored) -> str:
    """The arm that is subtracted, without what both arms have in common; empty for none."""
    parts = [] if entry["against"] is None else entry["against"].split(", ")
    own_parts = entry["arm"].split(", ")
    return ", ".join([part for part in parts if part not in own_parts] or parts)


def quantity(measure: Stored) -> str:
    """A measure in words: ``seeds with more than 95 % right answers``."""
    name, _ = in_words(measure["tag"])
    if measure.get("curve"):
        effect = measure["part"] == "effect"
        gain = "plain steps that a step is worth" if effect else "compute-equivalent gain"
        return f"{gain}, by {name}"
    if measure["solved"] is not None:
        return f"seeds with more than {_percent(measure['solved'])} {name}"
    if measure["last"] is not None:
        return f"{name}, mean over the last {_percent(measure['last'])} of the run"
    return name


def predicted(entry: Stored) -> str:
    """``above 0`` or ``within ±0.01``, followed by the expected size."""
    by = _brief(entry, entry["by"])
    region = f"within ±{by}" if entry["side"] == "within" else f"{entry['side']} {by}"
    size = entry["expected"]
    return region if size is None else f"{region}, expected {_brief(entry, size)}"


def measured(entry: Stored) -> str:
    """The effect with its interval, or the two shares."""
    if entry["effect"] is None:
        return "no numbers yet"
    if shares := [share(entry[name]) for name in ("own", "other") if entry[name] is not None]:
        return " against ".join(shares)
    effect = show(entry, entry["effect"])
    if entry["low"] is None:
        return f"{effect}, one seed"
    low, high = (show(entry, entry[name]) for name in ("low", "high"))
    for unit in (" ×", " points"):
        low, high = low.removesuffix(unit), high.removesuffix(unit)
    return f"{effect} [{low}, {high}]"


def share(stored: Stored) -> str:
    """``3 of 5 seeds [15 %, 95 %]``."""
    low, high = _percent(stored["low"]), _percent(stored["high"])
    return f"{stored['count']} of {stored['n']} seeds [{low}, {high}]"


def tested(entry: Stored) -> str:
    """``paired t, n = 5, p = 0.03 (Holm 0.06)``."""
    if entry["test"] is None:
        return ""
    text = f"{entry['test']}, n = {entry['n']}"
    p = entry["p"]
    return text if p is None else f"{text}, p {equals(p)} (Holm {p_value(entry['adjusted'])})"


def verdict(entry: Stored, more: str) -> str:
    """The verdict in Markdown, followed by the reason of an undecided one and what would help."""
    reason = "; ".join(filter(None, [entry["why"], more]))
    return f"**{plain(entry['verdict'])}**" + (f": {plain(reason)}" if reason else "")


def show(entry: Stored, value: float) -> str:
    """A value in the unit of what the prediction measures; a difference with its sign, that of two
    shares in percentage points."""
    if entry["measure"].get("curve"):
        return f"{value:.3f} ×"
    form = "%" if is_share(entry) else form_of(entry["measure"]["tag"])
    text = number(value, form)
    if form == "%" and entry["against"] is not None:
        text = text.replace("%", "points")
    return f"+{text}" if entry["against"] is not None and value >= 0 else text


def is_share(entry: Stored) -> bool:
    """Whether a prediction is of shares, or of a difference of two."""
    measure = entry["measure"]
    return measure["solved"] is not None or form_of(measure["tag"]) == "%"


def aligned(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[int] = ()
) -> list[str]:
    """A table as lines of text, cut at the terminal's width; ``right`` has the columns, from 0,
    that are aligned to the right."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    texts = []
    for line in lines:
        pairs = enumerate(zip(line, widths, strict=True))
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in pairs]
        text = "  ".join(cells).rstrip()
        texts.append(text if width is None or len(text) <= width else f"{text[: width - 1]}…")
    return texts


def beside(here: Stored, committed: Stored) -> list[str]:
    """One line per prediction: both numbers with their 95 % intervals, and whether these overlap.
    For two shares, the intervals of both arms must overlap."""
    return [
        f"{subject(mine)}, {quantity(mine['measure'])}: here {measured(mine)}, "
        f"committed {measured(theirs)}: {_agreement(mine, theirs)}"
        for mine, theirs in zip(entries(here), entries(committed), strict=True)
    ]


def _agreement(mine: Stored, theirs: Stored) -> str:
    pairs = list(zip(_intervals(mine), _intervals(theirs), strict=False))
    if not pairs:
        return "not to be compared yet"
    overlap = all(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs)
    return "they agree" if overlap else "they do not agree"


def _intervals(entry: Stored) -> list[Stored]:
    """The intervals of an entry: its shares or its effect. One seed has no interval."""
    parts = [entry[name] for name in ("own", "other") if entry[name]] or [entry]
    return [part for part in parts if part["low"] is not None]


def _brief(entry: Stored, value: float) -> str:
    """A number as in the claim's file; a share in percent, a difference of two in points."""
    if not value or not is_share(entry):
        return f"{value:g}".replace("-", "−")
    unit = "%" if entry["against"] is None else "point" if abs(value) == 0.01 else "points"
    return f"{100 * value:g} {unit}".replace("-", "−")


def _percent(share: float) -> str:
    """``0.95`` as ``95 %``, and ``0.995`` as ``99.5 %``."""
    percent = 100 * share
    # Only 0 and 1 are shown as 0 % and 100 %.
    digits = 1 if 0 < share < 0.005 or 0.995 <= share < 1 else 0
    return f"{percent:.{digits}f} %"
