"""Curves over training: the mean over seeds, and every seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sweeps.report.interactive import SEED
from sweeps.report.settings import Setting
from sweeps.report.style import MANY, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = dict[float, tuple[float, float]]
"""The (x, y) of a run's validations, by step."""


def draw_curves(axes: Axes, settings: list[Setting], lines: Sequence[Sequence[Points]]) -> None:
    """Bold: a setting's mean, at the validations that all of its runs have reached; thin: each run
    where a setting has several, unless there are too many lines.

    Args:
        axes: to draw on.
        settings: all.
        lines: for each setting the points of its runs; runs without any do not count.
    """
    for setting, look, runs in zip(settings, looks(settings), lines, strict=True):
        runs = [points for points in runs if points]
        if len(runs) > 1 and len(settings) <= MANY:
            for points in runs:
                axes.plot(
                    *zip(*points.values(), strict=True),
                    look.dash,
                    color=look.colour,
                    linewidth=0.7,
                    alpha=0.45,
                    label=f"{SEED}{setting.label}",
                )
        common = sorted(set.intersection(*(set(points) for points in runs))) if runs else []
        xs = [sum(points[step][0] for points in runs) / len(runs) for step in common]
        ys = [sum(points[step][1] for points in runs) / len(runs) for step in common]
        # A line of one point has no length.
        marker = look.marker if len(settings) > MANY or len(xs) == 1 else ""
        style = {"linestyle": look.dash, "marker": marker, "markersize": 3.5}
        axes.plot(xs, ys, color=look.colour, label=setting.label, **style)
