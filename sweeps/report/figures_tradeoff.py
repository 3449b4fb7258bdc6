"""Figures that weigh two things: a grid's heat map, and Pareto fronts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from sweeps.report.comparisons import pareto
from sweeps.report.metrics import BITS, FLOPS, Metric
from sweeps.report.settings import Setting, Settings, order, show
from sweeps.report.style import QUIET, SEEDS, Drawing, brief, canvas, key_to, looks, si_axis
from sweeps.report.text_error import text_errors


def heat_maps(settings: Settings) -> list[Drawing]:
    """Main-depth loss over two varied keys, one map for every value of the others."""
    keys = [key for key in settings.varied if _spread(settings.all, key) > 1]
    wanted = [key for key in ("mtp.depth", "mtp_lambda") if key in keys]
    pair = (wanted + [key for key in keys if key not in wanted])[:2]
    if len(pair) < 2:
        return [Drawing("heat_map", "Heat map", "").lacking("fewer than two keys are varied")]
    down, across = pair
    groups: dict[str, list[Setting]] = {}
    for setting in settings.all:
        rest = [f"{k}={show(v)}" for k, v in setting.values.items() if k not in pair]
        groups.setdefault(", ".join(rest), []).append(setting)
    maps = []
    for number, (name, members) in enumerate(groups.items()):
        if _spread(members, down) > 1 and _spread(members, across) > 1:
            drawing = _heat_map(members, down, across, name=name, metric=settings.headline)
            maps.append(replace(drawing, name=f"heat_map_{number}" if number else "heat_map"))
    return maps


def _heat_map(
    members: list[Setting], down: str, across: str, *, name: str, metric: Metric
) -> Drawing:
    import numpy as np

    drawing = Drawing(
        "heat_map",
        f"{down} by {across}" + (f" at {name}" if name else ""),
        f"Main-depth validation loss in {metric.unit}, mean over seeds and half of its 95 % "
        "interval; darker is lower, and better. A dash is a gap: no run, or one without a number."
        + _beside(members, metric),
    )
    rows = list(dict.fromkeys(show(s.values[down]) for s in members))
    columns = list(
        dict.fromkeys(
            show(s.values[across]) for s in sorted(members, key=lambda s: order(s.values[across]))
        )
    )
    cells = {
        (show(s.values[down]), show(s.values[across])): s.estimate(metric.tag).interval
        for s in members
    }
    known = [found.mean for found in cells.values() if found]
    if not known:
        return drawing.lacking(f"no finished run has {metric.tag}")
    low, high = min(known), max(known)
    figure, axes = canvas(rows=max(len(rows) - 5, 0))
    axes.grid(False)
    table = [[cells.get((row, column)) for column in columns] for row in rows]
    grid = [[math.nan if cell is None else cell.mean for cell in line] for line in table]
    # The scale ends beyond the data, so that the lightest cell is still a colour on white paper.
    scale: Any = {"vmin": low - 1e-12, "vmax": high + 0.35 * (high - low) + 1e-12}
    edges: Any = [[i - 0.5 for i in range(n + 1)] for n in (len(columns), len(rows))]
    axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="Blues_r", **scale)
    axes.invert_yaxis()
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            found = cells.get((row, column))
            dark = found is not None and found.mean < low + 0.55 * (high - low)
            text = "–" if found is None else f"{found.mean:.4f}"
            if found is not None and found.half is not None:
                text += f"\n± {found.half:.4f}"
            tone = "#fefefe" if dark else "#10233a" if found is not None else None
            axes.text(x, y, text, ha="center", va="center", color=tone, fontsize=9)
    letters = max(4, 48 // len(columns))
    axes.set_xticks(range(len(columns)), [brief(column, letters) for column in columns])
    axes.set_yticks(range(len(rows)), [brief(row, 16) for row in rows])
    axes.set(xlabel=brief(across), ylabel=brief(down, 30))
    return drawing.drawn(figure)


def front(settings: Settings, tag: str) -> Drawing:
    """Pareto front of the main loss against what training or decoding costs."""
    cheap, metric = tag == FLOPS, settings.headline
    drawing = Drawing(
        "pareto_flops" if cheap else "pareto_decoding",
        "Loss against training FLOPs" if cheap else "Loss against decoding speed",
        "Filled points, joined by the line, are those that no other setting beats in both "
        "(by their means: whether two points differ at all, the table of differences says). "
        + ("" if cheap else "Speed is of greedy decoding with drafts on the machine of the run. ")
        + SEEDS
        + _beside(settings.all, metric),
    )
    found = [(s, s.estimate(tag).interval, s.estimate(metric.tag).interval) for s in settings.all]
    points = [(s, cost, loss) for s, cost, loss in found if cost and loss]
    if not points:
        return drawing.lacking(f"no finished run has {tag} and {metric.tag}")
    sign = 1 if cheap else -1
    best = pareto([(sign * cost.mean, loss.mean) for _, cost, loss in points])
    figure, axes = canvas(key_to(settings.all, [s for s, _, _ in points]))
    line = sorted((c.mean, v.mean) for (_, c, v), on in zip(points, best, strict=True) if on)
    axes.plot(*zip(*line, strict=True), color=QUIET, linewidth=1.2)
    look_of = {id(s): look for s, look in zip(settings.all, looks(settings.all), strict=True)}
    for (setting, cost, loss), on in zip(points, best, strict=True):
        look = look_of[id(setting)]
        axes.errorbar(
            cost.mean,
            loss.mean,
            xerr=cost.half,
            yerr=loss.half,
            fmt=look.marker,
            color=look.colour,
            elinewidth=0.8,
            markersize=7,
            markerfacecolor=look.colour if on else "none",
            label=setting.label,
        )
    x_label = "training FLOPs" if cheap else "tokens per second, greedy with drafts"
    axes.set(xlabel=x_label, ylabel=metric.unit)
    si_axis(axes)
    return drawing.drawn(figure)


def _beside(settings: list[Setting], metric: Metric) -> str:
    """The error that the intervals over seeds leave out."""
    error = text_errors(settings) if metric.tag == BITS else ""
    return f" {error}".rstrip()


def _spread(settings: list[Setting], key: str) -> int:
    return len({show(setting.values.get(key)) for setting in settings})
