"""Draws the figures of a report. Each function returns a drawing or says why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from mtp_lightning.run.solved import EXACT
from sweeps import grouped
from sweeps.report import lines
from sweeps.report.chart import (
    COLORS,
    QUIETLY,
    Chart,
    Look,
    brief,
    by_row,
    key_to,
    looks,
    shares_by_row,
)
from sweeps.report.comparable import by_text
from sweeps.report.compare import Comparison, pareto, solved_share
from sweeps.report.drawing import Drawing, drawing_of, text_error
from sweeps.report.equivalent import Family, PlainCurve, Spent
from sweeps.report.metrics import CURVE_AXES, DECODE_SPEED, FLOPS, Metric
from sweeps.report.metrics import number as number_of
from sweeps.report.names import axis_of, name_of, sentence
from sweeps.report.settings import Setting, Settings, order, show
from sweeps.report.statistics import Interval

# Figures that join or rank settings: they are left out if the settings may not be compared. The
# other figures show each setting on its own.
_COMPARING = ("tokens_per_step", "speedup", "lambda_", "heat_map", "pareto_")
# The style of a setting at its cost and loss.
_POINT: Any = {"markersize": 7, "elinewidth": 0.8}


def draw(
    settings: Settings, comparisons: Sequence[Comparison], families: Sequence[Family] = ()
) -> list[Drawing]:
    """All figures in reading order, including those that lack data."""
    drawings = (
        [
            solved(settings),
            lines.exact_match(settings),
            lines.times(settings),
            lines.over_places(settings, "accuracy_position"),
            *lines.by_group(settings),
        ]
        if settings.is_task
        # The answer comes first: differences, or for a task the seeds that solve it.
        else [
            differences(comparisons, settings),
            *(gains(settings, family, i) for i, family in enumerate(families or [None])),
        ]
    )
    drawings += [
        *(lines.curve(settings, axis) for axis in CURVE_AXES),
        *lines.of_depths(settings),
        *lines.long_range(settings),
        *heat_maps(settings),
        front(settings, "pareto_flops", FLOPS),
        front(settings, "pareto_decoding", DECODE_SPEED, sign=-1),
    ]
    alike = len(by_text(settings.all)) < 2
    return drawings if alike else [_of_several_texts(drawing) for drawing in drawings]


def _of_several_texts(drawing: Drawing) -> Drawing:
    if drawing.chart is None:
        return drawing
    if drawing.name.startswith(_COMPARING):
        return drawing.lacking("it would compare settings with different evaluation data")
    return replace(drawing, caption=f"{drawing.caption} {sentence('other_data')}")


def gains(settings: Settings, family: Family | None, number: int = 0) -> Drawing:
    """The plain curve, and every arm's distance from it along the axis of FLOPs."""
    metric = settings.headline
    name = f"gains_{number}" if number else "gains"
    drawing = drawing_of(settings, "gains", name=name)
    if family is None:
        return drawing.lacking("no plain runs (mtp=none) of two lengths and an arm to compare")
    arms = [(arm, point) for arm in family.arms if (point := _ends(arm.setting, metric))]
    key = key_to(settings.all, [arm.setting for arm, _ in arms])
    chart = Chart([("plain training", QUIETLY), *key], names=settings.names)
    axes = chart.axes
    axes.set_xscale("log")
    ends = [(setting, point) for setting in family.plain if (point := _ends(setting, metric))]
    for setting, (cost, loss) in ends:
        chart.draw(setting.name, QUIETLY, [cost], [loss], **_POINT)
    with suppress(ValueError):  # the means do not fall with compute: no curve
        plain = PlainCurve([Spent(cost.mean, loss.mean, 1) for _, (cost, loss) in ends])
        first, last = plain.runs[0].loss, plain.runs[-1].loss
        losses = [first + (last - first) * i / 100 for i in range(101)]
        flops = [plain.flops_at(loss) or math.nan for loss in losses]
        axes.plot(flops, losses, color=QUIETLY.color, linewidth=1.4)
    look_of = looks(settings.all)
    for arm, (cost, loss) in arms:
        look = look_of[arm.setting]
        chart.draw(arm.setting.name, look, [cost], [loss], **_POINT)
        if arm.total is None:
            continue
        end = cost.mean * arm.total.mean
        arrow: Any = {"arrowstyle": "->", "color": look.color, "shrinkA": 4, "shrinkB": 0}
        axes.annotate("", (end, loss.mean), (cost.mean, loss.mean), arrowprops=arrow)
        leftward = end < cost.mean
        axes.annotate(
            f"{arm.total.mean:.2f} ×",
            (end, loss.mean),
            (-4 if leftward else 4, 0),
            textcoords="offset points",
            ha="right" if leftward else "left",
            va="center",
            fontsize=9,
            color=look.color,
        )
    budgets = sorted({cost.mean for _, (cost, _) in ends})
    shown_at = budgets[:: max(len(budgets) // 6, 1)]
    axes.set_xticks(shown_at, [number_of(x, "si") for x in shown_at])
    axes.minorticks_off()
    return drawing.drawn(chart)


def _ends(setting: Setting, metric: Metric, tag: str = FLOPS) -> tuple[Interval, Interval] | None:
    """A setting's cost and main loss; None if either is missing."""
    cost, loss = setting.estimate(tag).interval, setting.estimate(metric.tag).interval
    return (cost, loss) if cost and loss else None


def solved(settings: Settings) -> Drawing:
    """The share of seeds that solve the task, for every setting."""
    drawing = drawing_of(settings, "solved")
    look_of, level = looks(settings.all), settings.level
    rows = [(s.name, look_of[s], share) for s in settings.all if (share := solved_share(s, level))]
    if not rows:
        return drawing.lacking(f"no finished run has {EXACT}")
    return drawing.drawn(shares_by_row(rows, names=settings.names))


def differences(comparisons: Sequence[Comparison], settings: Settings) -> Drawing:
    """Every setting's difference to its reference."""
    drawing = drawing_of(settings, "differences")
    paired = [(c, c.paired.difference) for c in reversed(comparisons) if c.paired]
    if not paired and any(c.refused for c in comparisons):
        return drawing.lacking("no setting has the same evaluation data as its reference")
    if not paired:
        return drawing.lacking("no two finished settings share a seed")
    chart = by_row([c.setting.name for c, _ in paired], names=settings.names)
    chart.axes.axvline(0, color=QUIETLY.color, linewidth=1)
    look = Look(COLORS[0], "-", "o")
    for y, (comparison, difference) in enumerate(paired):
        chart.draw(comparison.setting.name, look, [difference], [y], filled=comparison.differs)
    return drawing.drawn(chart)


def front(settings: Settings, name: str, tag: str, *, sign: int = 1) -> Drawing:
    """Pareto front of the main loss against a tag; ``sign`` is -1 where more of it is better."""
    metric = settings.headline
    drawing = drawing_of(settings, name)
    points = [(s, point) for s in settings.all if (point := _ends(s, metric, tag))]
    if not points:
        return drawing.lacking(f"no finished run has {tag} and {metric.tag}")
    best = pareto([(sign * cost.mean, loss.mean) for _, (cost, loss) in points])
    chart = Chart(key_to(settings.all, [s for s, _ in points]), names=settings.names)
    line = sorted((c.mean, v.mean) for (_, (c, v)), on in zip(points, best, strict=True) if on)
    chart.axes.plot(*zip(*line, strict=True), color=QUIETLY.color, linewidth=1.2)
    look_of = looks(settings.all)
    for (setting, (cost, loss)), on in zip(points, best, strict=True):
        chart.draw(setting.name, look_of[setting], [cost], [loss], filled=on, **_POINT)
    chart.si_axis()
    return drawing.drawn(chart)


def heat_maps(settings: Settings) -> list[Drawing]:
    """Loss for the next token over two varied keys, one map for all values of the other keys."""
    preferred = [key for key in ("mtp.depth", "mtp_lambda") if key in settings.varied]
    pair = (preferred + [key for key in settings.varied if key not in preferred])[:2]
    if len(pair) < 2:
        return [Drawing("heat_map", "Heat map", "").lacking("fewer than two keys are varied")]
    groups = grouped(
        (", ".join(name_of(k, show(v)) for k, v in s.values.items() if k not in pair), s)
        for s in settings.all
    )
    maps = []
    for number, (name, members) in enumerate(groups.items()):
        if all(len({show(s.values.get(key)) for s in members}) > 1 for key in pair):
            file = f"heat_map_{number}" if number else "heat_map"
            maps.append(_heat_map(settings, members, *pair, name=name, file=file))
    return maps


def _heat_map(
    settings: Settings, members: list[Setting], down: str, across: str, *, name: str, file: str
) -> Drawing:
    import numpy as np

    tag = settings.headline.tag
    place = f" at {name}" if name else ""
    words = {"down": axis_of(down), "across": axis_of(across), "at": place}
    error = text_error(settings, members)
    drawing = drawing_of(settings, "heat_map", name=file, text_error=error, **words)
    by_column = sorted(members, key=lambda s: order(s.values[across]))
    rows = list(dict.fromkeys(show(s.values[down]) for s in members))
    columns = [show(s.values[across]) for s in by_column if s.values[across] is not None]
    columns = list(dict.fromkeys(columns))
    cells = {
        (show(s.values[down]), column): s.estimate(tag).interval
        for s in members
        for column in columns
        # Plain training lacks a key of MTP, and has its whole row.
        if s.values[across] is None or column == show(s.values[across])
    }
    means = [cell.mean for cell in cells.values() if cell]
    if not means:
        return drawing.lacking(f"no finished run has {tag}")
    if len(cells) < len(rows) * len(columns) / 2:  # such as the trials of a search
        return drawing.lacking("most pairs of these values have no run")
    low, high = min(means), max(means)
    chart = Chart(rows=max(len(rows) - 5, 0))
    axes = chart.axes
    axes.grid(False)
    table = [[cells.get((row, column)) for column in columns] for row in rows]
    grid = [[math.nan if cell is None else cell.mean for cell in line] for line in table]
    # The scale ends beyond the data, so that even the lightest cell differs from white paper.
    scale: Any = {"vmin": low - 1e-12, "vmax": high + 0.35 * (high - low) + 1e-12}
    edges: Any = [[i - 0.5 for i in range(n + 1)] for n in (len(columns), len(rows))]
    axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="Blues_r", **scale)
    axes.invert_yaxis()
    for y, line in enumerate(table):
        for x, cell in enumerate(line):
            dark = cell is not None and cell.mean < low + 0.55 * (high - low)
            text = "–" if cell is None else f"{cell.mean:.4f}"
            if cell is not None and cell.half is not None:
                text += f"\n± {cell.half:.4f}"
            tone = "#fefefe" if dark else "#10233a" if cell is not None else None
            axes.text(x, y, text, ha="center", va="center", color=tone, fontsize=9)
    letters = max(4, 48 // len(columns))
    axes.set_xticks(range(len(columns)), [brief(column, letters) for column in columns])
    axes.set_yticks(range(len(rows)), [brief(row, 16) for row in rows])
    axes.set(xlabel=brief(axis_of(across)), ylabel=brief(axis_of(down), 30))
    return drawing.drawn(chart)
