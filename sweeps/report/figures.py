"""The figures of a report: each function draws one, or says what it lacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from sweeps.report.comparable import by_text
from sweeps.report.comparisons import Comparison
from sweeps.report.curves import Points, draw_curves
from sweeps.report.figures_depth import against_depth, against_lambda, by_depth
from sweeps.report.figures_long_range import long_range
from sweeps.report.figures_task import task_figures
from sweeps.report.figures_tradeoff import front, heat_maps
from sweeps.report.metrics import CURVE_AXES, DECODE_SPEED, FLOPS, LOSS, PER_STEP, SPEEDUP, Metric
from sweeps.report.read import Run
from sweeps.report.settings import Settings
from sweeps.report.style import (
    COLOURS,
    QUIET,
    Drawing,
    by_row,
    canvas,
    key_to,
    si_axis,
)


def draw(settings: Settings, comparisons: Sequence[Comparison]) -> list[Drawing]:
    """Every figure that the runs have something to show in, in reading order."""
    drawings = [
        *task_figures(settings),
        *(curve(settings, axis) for axis in CURVE_AXES),
        # Settings of a task are compared by the seeds that solve it.
        *([] if settings.is_task else [differences(comparisons, settings.headline)]),
        by_depth(settings, "loss"),
        by_depth(settings, "agreement"),
        against_depth(settings, PER_STEP),
        against_depth(settings, SPEEDUP),
        against_lambda(settings, LOSS, "main-depth validation loss"),
        against_lambda(settings, "val/loss_depth_1", "validation loss of depth 1"),
        *long_range(settings),
        *heat_maps(settings),
        front(settings, FLOPS),
        front(settings, DECODE_SPEED),
    ]
    if len(by_text(settings.all)) > 1:
        which = "asked different questions" if settings.is_task else "evaluated on different texts"
        drawings = [_of_several_texts(drawing, which) for drawing in drawings]
    return drawings


# What joins settings by a line, or ranks them: nothing is left of it where these may not be
# compared. The other figures show every setting for itself.
_COMPARING = ("tokens_per_step", "speedup", "lambda_", "heat_map", "pareto_")


def _of_several_texts(drawing: Drawing, which: str) -> Drawing:
    if drawing.figure is None:
        return drawing
    if drawing.name.startswith(_COMPARING):
        why = f"it would compare settings that were {which}"
        return replace(drawing, figure=None, why=why)
    warning = f" The settings were {which}: compare none across these."
    return replace(drawing, caption=drawing.caption + warning)


def curve(settings: Settings, axis: str) -> Drawing:
    """Main-depth validation loss against tokens, FLOPs or seconds."""
    tag, x_label = CURVE_AXES[axis]
    metric = settings.headline
    title = f"Loss against {axis if axis != 'flops' else 'FLOPs'}"
    drawing = Drawing(
        f"loss_{axis}",
        title,
        "Bold: mean over seeds, at the validations that all of them have reached. Thin: single "
        "seeds, running ones too. Losses above those of the last three quarters are cut off."
        + (
            " Seconds are the mean over seeds, and those of a shared machine." * (axis == "seconds")
        ),
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
    axes.set(xlabel=x_label, ylabel=metric.unit)
    if axis != "seconds":
        si_axis(axes)
    return drawing.drawn(figure)


def differences(comparisons: Sequence[Comparison], metric: Metric) -> Drawing:
    """Every setting's difference to its reference."""
    shown = [c for c in comparisons if c.result]
    drawing = Drawing(
        "differences",
        "Differences to the reference",
        "Main-depth validation loss of a setting minus its reference's, paired by seed, with the "
        "95 % interval of that one difference (not corrected for the number of tests). Left of "
        "the line is better; filled is beyond noise after Holm's correction.",
    )
    if not shown and any(c.refused for c in comparisons):
        return drawing.lacking("no setting was evaluated on the same text as its reference")
    if not shown:
        return drawing.lacking("no two finished settings share a seed")
    figure, axes = by_row([c.setting.label for c in reversed(shown)])
    axes.axvline(0, color=QUIET, linewidth=1)
    for y, found in enumerate(reversed(shown)):
        assert found.result is not None
        difference = found.result.difference
        axes.errorbar(
            difference.mean,
            y,
            xerr=difference.half,
            fmt="o",
            color=COLOURS[0],
            markerfacecolor=COLOURS[0] if found.differs else "none",
            label=found.setting.label,
        )
    axes.set_xlabel(f"difference in {metric.unit}")
    return drawing.drawn(figure)


def _points(run: Run, tag: str, loss: str) -> Points:
    """(cost, loss) of a run's validations, by step."""
    return {row["step"]: (row[tag], row[loss]) for row in run.rows if tag in row and loss in row}
