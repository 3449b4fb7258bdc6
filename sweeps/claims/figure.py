"""Draws a claim's figures in the report's look: per measure, the effects with intervals and
thresholds, or the share of seeds that solve; and training loss against compute for arms of the same
FLOPs."""

from __future__ import annotations

import hashlib
import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.run.atomic import write_bytes
from mtp_lightning.run.config import values_by_key
from sweeps import grouped
from sweeps.claims import words
from sweeps.claims.claim import ClaimMeasure
from sweeps.claims.decide import UNDECIDED, arm_share
from sweeps.claims.observe import POINTS
from sweeps.claims.result import Result
from sweeps.claims.reuse import runs_of
from sweeps.report.chart import COLORS, QUIET, Chart, Look, by_row, looks_of, shares_by_row, styled
from sweeps.report.metrics import first_to_last, number
from sweeps.report.names import in_words, name_of
from sweeps.report.statistics import Interval, interval

# The suffix of the file with the curves.
_CURVE = "_curve"
# The share of the compute that the y-axis leaves out: the early fall would hide the differences.
_SHOWN_FROM = 0.2
SOFT = "#5b6672"
_LOOK = Look(COLORS[0], "-", "o")


def write_figures(result: Result, label: str, folder: Path) -> list[Path]:
    """Write ``LABEL.svg``, ``LABEL_2.svg`` .. for further measures with numbers, and
    ``LABEL_curve.svg`` where arms have the same FLOPs, into an existing folder."""
    files = files_of(result, label, folder)
    with styled():
        charts = [_draw(result, entries) for entries in _drawn(result)]
        charts += [draw_curves(result)] if panels(result) else []
        for file, chart in zip(files, charts, strict=True):
            title = textwrap.fill(caption(result, file), 76)
            chart.figure.suptitle(title, fontsize=8.5, color=SOFT)
            write_bytes(chart.svg(source=digest(result)), file)
    return files


def files_of(result: Result, label: str, folder: Path) -> list[Path]:
    """The paths of a result's figures; the curves come last."""
    n = len(_drawn(result))
    files = [folder / f"{label}{f'_{i}' if i > 1 else ''}.svg" for i in range(1, n + 1)]
    return [*files, folder / f"{label}{_CURVE}.svg"] if panels(result) else files


def digest(result: Result) -> str:
    """SHA-256 of a result, stored in the metadata of its figures."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def seeds_and_size(result: Result) -> tuple[str, str]:
    """Numbers of finished seeds per arm and of parameters: ``("4 to 5", "218 k to 384 k")``."""
    by_arm = [
        [run for run in arm["seeds"].values() if run["state"] == "done"]
        for arm in result["arms"].values()
    ]
    counts = sorted({len(runs) for runs in by_arm if runs})
    sizes = sorted({run["costs"].get("parameters", 0) for runs in by_arm for run in runs} - {0})
    seeds, parameters = map(str, counts), (number(size, "si") for size in sizes)
    return first_to_last([*seeds]), first_to_last([*parameters])


def caption(result: Result, file: Path) -> str:
    """The number of seeds and the size of the models, and how the figure in a file is read."""
    curves = file.stem.endswith(_CURVE)
    seeds, size = seeds_and_size(result)
    facts = f"{seeds} {'seed' if seeds == '1' else 'seeds'} per arm"
    facts += f", {size} parameters" if size else ""
    shares = any(e["measure"]["solved"] is not None for e in result["predictions"])
    details = "" if curves or shares else ", orange ticks the thresholds; filled points are decided"
    return f"{facts}. {'Bands' if curves else 'Bars'} are 95 % intervals{details}."


def _drawn(result: Result) -> list[list[dict[str, Any]]]:
    """The predictions with numbers, grouped by measure."""
    entries = [entry for entry in words.entries(result) if entry["effect"] is not None]
    return [*grouped((words.quantity(entry["measure"]), entry) for entry in entries).values()]


def _draw(result: Result, entries: Sequence[dict[str, Any]]) -> Chart:
    measure = entries[0]["measure"]
    return _effects(entries) if measure["solved"] is None else _shares(result, measure)


def _effects(entries: Sequence[dict[str, Any]]) -> Chart:
    """A filled point is a decided prediction, a tick is its threshold."""
    bottom_up = list(reversed(entries))
    measure = bottom_up[0]["measure"]
    others = {words.other_of(entry) for entry in bottom_up}
    # One arm that all others are compared with stands in the axis' title alone.
    (against,) = others if len(others) == 1 else [""]
    chart = by_row([entry["arm"] if against else words.subject(entry) for entry in bottom_up])
    ratio = bool(measure.get("curve"))
    if ratio or "" not in others:
        chart.axes.axvline(1 if ratio else 0, color=QUIET, linewidth=1)
    for y, entry in enumerate(bottom_up):
        effect, low, high = (entry[key] for key in ("effect", "low", "high"))
        ends = None if low is None else Interval(effect, None, entry["n"], (low, high))
        filled = entry["verdict"] != UNDECIDED
        chart.draw("", _LOOK, [ends or effect], [y], filled=filled)
        bounds = [entry["by"], -entry["by"]] if entry["side"] == "within" else [entry["by"]]
        chart.axes.plot(bounds, [y] * len(bounds), "|", color=COLORS[1], markersize=14)
    if words.is_share(bottom_up[0]) and not ratio:
        chart.percent("x", whole=False)
    # Few ticks, which do not overlap.
    chart.axes.locator_params("x", nbins=5)
    label = words.quantity(measure)
    if "" not in others and not against and not ratio:
        label = f"difference in {label}"
    less = f"minus that of {against}" if against and not ratio else ""
    better = "" if ratio else in_words(measure["tag"])[1]
    if ratio and measure["part"] == "total" and "" in others:
        better = "above 1 pays for itself"
    _title(chart, label, less, f"({better})" if better else "")
    return chart


def _title(chart: Chart, *parts: str) -> None:
    """Name the x axis, with a line of its own for each part where the name is long."""
    short = len(" ".join(parts)) < 44
    lines = [" ".join(filter(None, parts))] if short else [textwrap.fill(p, 46) for p in parts if p]
    chart.axes.set_xlabel("\n".join(lines))


def _shares(result: Result, measure: dict[str, Any]) -> Chart:
    """Every arm's share of seeds that solve, with its interval."""
    names, parsed = words.names_in(result), ClaimMeasure.from_json(measure)
    shares = {arm: arm_share(runs_of(stored), parsed) for arm, stored in result["arms"].items()}
    chart = shares_by_row([(names[arm], _LOOK, share) for arm, share in shares.items() if share])
    _title(chart, words.quantity(measure), "(more is better)")
    return chart


def panels(result: Result) -> dict[str, list[str]]:
    """The arms with curves, by tokenizer: nats per token of different tokenizers do not compare."""
    return grouped(
        (name_of("tokenizer", values_by_key(content["overrides"]).get("tokenizer", "")), arm)
        for arm, content in result["arms"].items()
        if _curves(content)
    )


def draw_curves(result: Result) -> Chart:
    """The main prediction's training loss against compute: one panel per tokenizer, one line per
    arm, with its interval over seeds. The result has at least one curve."""
    groups, names = panels(result), words.names_in(result)
    # The panel's title says the tokenizer.
    short = {
        arm: names[arm].removesuffix(f", {title}") for title, arms in groups.items() for arm in arms
    }
    heads = [name.partition(", D = ") for name in dict.fromkeys(short.values())]
    key = zip(map("".join, heads), looks_of((head, d) for head, _, d in heads), strict=True)
    look_of = dict(key)
    lines = [(name, Look(look.color, look.dash, "")) for name, look in look_of.items()]
    chart = Chart(lines, panels=len(groups))
    for axes, (title, arms) in zip(chart.panels, groups.items(), strict=True):
        highest, lowest = 0.0, math.inf
        for arm in arms:
            curves, look = _curves(result["arms"][arm]), look_of[short[arm]]
            xs = [math.fsum(curve[i][0] for curve in curves) / len(curves) for i in range(POINTS)]
            means = [interval([curve[i][1] for curve in curves]) for i in range(POINTS)]
            axes.plot(xs, [m.mean for m in means], color=look.color, linestyle=look.dash)
            low, high = ([m.mean + sign * (m.half or 0.0) for m in means] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=look.color, alpha=0.18, linewidth=0)
            late = [m.mean for x, m in zip(xs, means, strict=True) if x >= _SHOWN_FROM * xs[-1]]
            highest, lowest = max(highest, *late), min(lowest, *low)
        axes.set(ylim=(lowest, highest), xlabel="training FLOPs")
        axes.set_xlim(0)
        if len(groups) > 1:
            axes.set_title(title, fontsize=10.5)
    chart.si_axis()
    chart.axes.set_ylabel("training loss of the next token\n(nats per token, lower is better)")
    return chart


def _curves(content: dict[str, Any]) -> list[Any]:
    return [run["curve"] for run in content["seeds"].values() if run.get("curve")]
