"""Figures over training: losses, right answers, and seeds that have not solved their task yet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sweeps.report.compare import time_to_solve
from sweeps.report.hover import SEED
from sweeps.report.metrics import CHANCE, CURVE_AXES, EXACT
from sweeps.report.read import Run
from sweeps.report.settings import Setting, Settings
from sweeps.report.style import MANY, QUIET, Drawing, canvas, key_to, looks, share_axis, si_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[float, tuple[float, float]]
"""The (x, y) of a run's validations, by step."""


def curve(settings: Settings, axis: str) -> Drawing:
    """Main-depth validation loss against tokens, FLOPs or seconds."""
    tag, x_label = CURVE_AXES[axis]
    metric = settings.headline
    drawing = Drawing(
        f"loss_{axis}",
        f"Loss against {axis if axis != 'flops' else 'FLOPs'}",
        "Bold: mean over seeds, at the validations that all of them have reached. Thin: single "
        "seeds, running ones too. Losses above those of the last three quarters are cut off."
        + " Seconds are the mean over seeds, and those of a shared machine."
        * (axis == "seconds"),
    )
    lines = [[_points(run, tag, metric.tag) for run in setting.runs] for setting in settings.all]
    if not any(points for runs in lines for points in runs):
        return drawing.lacking(f"no run has logged {tag} and {metric.tag}")
    figure, axes = canvas(key_to(settings.all, settings.all))
    draw_curves(axes, settings.all, lines)
    places = [place for runs in lines for points in runs for place in points.values()]
    furthest = max(x for x, _ in places)
    late = [y for x, y in places if x >= furthest / 4 and math.isfinite(y)]
    if late and max(late) > min(late):
        margin = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(xlabel=x_label, ylabel=f"{metric.unit} (lower is better)")
    if axis != "seconds":
        si_axis(axes)
    return drawing.drawn(figure)


def _points(run: Run, tag: str, loss: str) -> Points:
    """(cost, loss) of a run's validations, by step."""
    return {row["step"]: (row[tag], row[loss]) for row in run.rows if tag in row and loss in row}


def draw_curves(axes: Axes, settings: list[Setting], lines: Sequence[Sequence[Points]]) -> None:
    """Draw each setting's mean in bold, at the validations that all of its runs have reached, and
    its single runs thin, unless there are too many lines.

    Args:
        axes: the axes to draw on.
        settings: all settings.
        lines: per setting the points of its runs; runs without points are left out.
    """
    for setting, look, runs in zip(settings, looks(settings), lines, strict=True):
        runs = [points for points in runs if points]
        if len(runs) > 1 and len(settings) <= MANY:
            for points in runs:
                axes.plot(
                    *zip(*points.values(), strict=True),
                    look.dash,
                    color=look.color,
                    linewidth=0.7,
                    alpha=0.45,
                    label=f"{SEED}{setting.name}",
                )
        common = sorted(set.intersection(*(set(points) for points in runs))) if runs else []
        xs = [sum(points[step][0] for points in runs) / len(runs) for step in common]
        ys = [sum(points[step][1] for points in runs) / len(runs) for step in common]
        # A single point needs a marker to be seen.
        marker = look.marker if len(settings) > MANY or len(xs) == 1 else ""
        style = {"linestyle": look.dash, "marker": marker, "markersize": 3.5}
        axes.plot(xs, ys, color=look.color, label=setting.name, **style)


def exact_match(settings: Settings) -> Drawing:
    """Right answers against optimizer steps."""
    drawing = Drawing(
        "exact_match",
        "Exact match against steps",
        "Share of greedily decoded answers that are right. Bold: mean over seeds, at the "
        "validations that all of them have reached. Thin: single seeds, running ones too. Dotted: "
        f"chance. Dashed: a seed solves above {settings.level:g}.",
    )
    lines = [[_points(run, "step", EXACT) for run in setting.runs] for setting in settings.all]
    if not any(points for runs in lines for points in runs):
        return drawing.lacking(f"no run has logged {EXACT}")
    figure, axes = canvas(key_to(settings.all, settings.all))
    runs = [run for setting in settings.all for run in setting.runs]
    for chance in sorted({row[CHANCE] for run in runs for row in run.rows if CHANCE in row}):
        axes.axhline(chance, linestyle=":", color=QUIET, linewidth=1.2, label="chance")
    axes.axhline(settings.level, linestyle="--", color=QUIET, linewidth=0.8, label="solved")
    draw_curves(axes, settings.all, lines)
    share_axis(axes, "y")
    axes.set(xlabel="optimizer steps", ylabel="right answers (more is better)")
    si_axis(axes)
    return drawing.drawn(figure)


def times(settings: Settings) -> Drawing:
    """Survival curves of the time to solve."""
    drawing = Drawing(
        "time_to_solve",
        "Time to solve",
        f"Share of seeds that no validation has yet found above {settings.level:g} "
        "(Kaplan-Meier). Ticks: seeds that had not solved at their last validation, running and "
        "failed ones too. A seed that falls back later has solved here, and not in the share of "
        "seeds that solve. Times are known to the interval between validations.",
    )
    curves = [time_to_solve(setting, settings.level) for setting in settings.all]
    shown = [s for s, found in zip(settings.all, curves, strict=True) if found]
    if not shown:
        return drawing.lacking(f"no run has logged {EXACT}")
    figure, axes = canvas(key_to(settings.all, shown))
    for setting, look, found in zip(settings.all, looks(settings.all), curves, strict=True):
        if found is None:
            continue
        axes.step(
            [0, *found.times],
            [1, *found.shares],
            look.dash,
            where="post",
            color=look.color,
            label=setting.name,
        )
        ticks = [found.after(time) for time in found.censored]
        axes.plot(found.censored, ticks, "|", color=look.color, markersize=9)
    share_axis(axes, "y")
    axes.set(xlabel="optimizer steps", ylabel="seeds not solved yet (fewer is better)")
    si_axis(axes)
    return drawing.drawn(figure)
