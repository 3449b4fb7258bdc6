"""Figures over training: losses, right answers, and seeds that have not solved their task yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sweeps.report.chart import MANY, QUIET, Chart, key_to, looks
from sweeps.report.compare import time_to_solve
from sweeps.report.drawing import Drawing, drawing_of
from sweeps.report.metrics import CHANCE, CURVE_AXES, EXACT
from sweeps.report.names import sentence
from sweeps.report.settings import Settings

Points = Mapping[float, tuple[float, float]]
"""The (x, y) of a run's validations, by step."""


def curve(settings: Settings, axis: str) -> Drawing:
    """Main-depth validation loss against tokens, FLOPs or seconds."""
    tag, x = CURVE_AXES[axis]
    metric = settings.headline
    drawing = drawing_of(
        settings,
        "loss",
        name=f"loss_{axis}",
        against="FLOPs" if axis == "flops" else axis,
        remark=sentence("seconds") if axis == "seconds" else "",
        x=x,
    )
    lines = _lines(settings, tag, metric.tag)
    places = [place for runs in lines for points in runs for place in points.values()]
    if not places:
        return drawing.lacking(f"no run has logged {tag} and {metric.tag}")
    chart = _over_training(settings, lines)
    furthest = max(x for x, _ in places)
    late = [y for x, y in places if x >= furthest / 4 and math.isfinite(y)]
    if late and max(late) > min(late):
        margin = 0.08 * (max(late) - min(late))
        chart.axes.set_ylim(min(late) - margin, max(late) + margin)
    if axis != "seconds":
        chart.si_axis()
    return drawing.drawn(chart)


def exact_match(settings: Settings) -> Drawing:
    """Right answers against optimizer steps."""
    drawing = drawing_of(settings, "exact_match")
    lines = _lines(settings, "step", EXACT)
    if not any(lines):
        return drawing.lacking(f"no run has logged {EXACT}")
    chart = _over_training(settings, lines)
    axes = chart.axes
    rows = [row for setting in settings.all for run in setting.runs for row in run.rows]
    for chance in sorted({row[CHANCE] for row in rows if CHANCE in row}):
        axes.axhline(chance, linestyle=":", color=QUIET, linewidth=1.2, label="chance")
    axes.axhline(settings.level, linestyle="--", color=QUIET, linewidth=0.8, label="solved")
    chart.percent("y")
    chart.si_axis()
    return drawing.drawn(chart)


def _lines(settings: Settings, x_tag: str, y_tag: str) -> list[list[Points]]:
    """The points of the runs that have some, for every setting."""
    lines: list[list[Points]] = []
    for setting in settings.all:
        rows = [[r for r in run.rows if x_tag in r and y_tag in r] for run in setting.runs]
        lines.append([{r["step"]: (r[x_tag], r[y_tag]) for r in run} for run in rows if run])
    return lines


def _over_training(settings: Settings, lines: Sequence[Sequence[Points]]) -> Chart:
    """Draw each setting's mean in bold, at the validations that all of its runs have reached, and
    its single runs thin, unless there are too many lines."""
    many = len(settings.all) > MANY
    chart = Chart(key_to(settings.all, settings.all), names=settings.names)
    for (setting, look), runs in zip(looks(settings.all).items(), lines, strict=True):
        for points in runs if len(runs) > 1 and not many else ():
            thin = {"linestyle": look.dash, "marker": "", "linewidth": 0.7, "alpha": 0.45}
            coordinates = zip(*points.values(), strict=True)
            chart.draw(setting.name, look, *coordinates, tooltips=False, **thin)
        common = sorted(set.intersection(*(set(points) for points in runs))) if runs else []
        xs, ys = (
            [sum(points[step][i] for points in runs) / len(runs) for step in common] for i in (0, 1)
        )
        # A single point needs a marker to be seen.
        marker = look.marker if many or len(common) == 1 else ""
        bold = {"linestyle": look.dash, "marker": marker, "markersize": 3.5}
        chart.draw(setting.name, look, xs, ys, **bold)
    return chart


def times(settings: Settings) -> Drawing:
    """Survival curves of the time to solve."""
    drawing = drawing_of(settings, "time_to_solve")
    curves = {s: survival for s in settings.all if (survival := time_to_solve(s, settings.level))}
    if not curves:
        return drawing.lacking(f"no run has logged {EXACT}")
    chart = Chart(key_to(settings.all, [*curves]), names=settings.names)
    look_of = looks(settings.all)
    for setting, survival in curves.items():
        look = look_of[setting]
        style = {"drawstyle": "steps-post", "linestyle": look.dash, "marker": ""}
        chart.draw(setting.name, look, [0, *survival.times], [1, *survival.shares], **style)
        ticks = [survival.after(time) for time in survival.censored]
        chart.axes.plot(survival.censored, ticks, "|", color=look.color, markersize=9)
    chart.percent("y")
    chart.si_axis()
    return drawing.drawn(chart)
