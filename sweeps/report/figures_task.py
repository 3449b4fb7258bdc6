"""Figures of a task: how many answers are right, which seeds solve it and when, and which tokens
of the answers are right."""

from __future__ import annotations

from sweeps.report.curves import draw_curves
from sweeps.report.figures_long_range import over_places, tags_like
from sweeps.report.metrics import CHANCE, EXACT
from sweeps.report.settings import Settings
from sweeps.report.solving import solved_share, time_to_solve
from sweeps.report.style import (
    QUIET,
    SEEDS,
    Drawing,
    by_row,
    canvas,
    doubling_axis,
    keep_within,
    key_to,
    looks,
    si_axis,
)

_WHOLE = (-0.03, 1.03)  # limits of an axis for shares
_NO_GROUPS = "depth|position|repeat|random_repeat"  # what else is called accuracy_.._NUMBER


def task_figures(settings: Settings) -> list[Drawing]:
    """Of a task's runs, in reading order; nothing for others."""
    if not settings.is_task:
        return []
    drawings = [exact_match(settings), solved(settings), times(settings), by_position(settings)]
    return drawings + by_group(settings)


def exact_match(settings: Settings) -> Drawing:
    """Right answers against optimizer steps."""
    drawing = Drawing(
        "exact_match",
        "Exact match against steps",
        "Share of greedily decoded answers that are right. Bold: mean over seeds, at the "
        "validations that all of them have reached. Thin: single seeds, running ones too. Dotted: "
        f"chance. Dashed: a seed solves above {settings.level:g}.",
    )
    lines = [
        [
            {row["step"]: (row["step"], row[EXACT]) for row in run.rows if EXACT in row}
            for run in setting.runs
        ]
        for setting in settings.all
    ]
    if not any(points for runs in lines for points in runs):
        return drawing.lacking(f"no run has logged {EXACT}")
    figure, axes = canvas(key_to(settings.all, settings.all))
    runs = [run for setting in settings.all for run in setting.runs]
    for chance in sorted({row[CHANCE] for run in runs for row in run.rows if CHANCE in row}):
        axes.axhline(chance, linestyle=":", color=QUIET, linewidth=1.2, label="chance")
    axes.axhline(settings.level, linestyle="--", color=QUIET, linewidth=0.8, label="solved")
    draw_curves(axes, settings.all, lines)
    axes.set_ylim(*_WHOLE)
    axes.set(xlabel="optimizer steps", ylabel="share of answers")
    si_axis(axes)
    return drawing.drawn(figure)


def solved(settings: Settings) -> Drawing:
    """The share of seeds that solve, for every setting."""
    drawing = Drawing(
        "solved",
        "Seeds that solve",
        f"Share of finished seeds whose final exact match is above {settings.level:g}, with its "
        "95 % interval (Clopper-Pearson, of that one share).",
    )
    shares = [(s, solved_share(s, settings.level)) for s in settings.all]
    shown = [(setting, share) for setting, share in reversed(shares) if share]
    if not shown:
        return drawing.lacking(f"no finished run has {EXACT}")
    figure, axes = by_row([setting.label for setting, _ in shown])
    look_of = {id(s): look for s, look in zip(settings.all, looks(settings.all), strict=True)}
    for y, (setting, share) in enumerate(shown):
        reach = [[share.rate - share.low], [share.high - share.rate]]
        look = look_of[id(setting)]
        axes.errorbar(
            share.rate, y, xerr=reach, fmt=look.marker, color=look.colour, label=setting.label
        )
    axes.set_xlim(*_WHOLE)
    axes.set_xlabel("share of seeds")
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
    shown = [s for s, curve in zip(settings.all, curves, strict=True) if curve]
    if not shown:
        return drawing.lacking(f"no run has logged {EXACT}")
    figure, axes = canvas(key_to(settings.all, shown))
    for setting, look, curve in zip(settings.all, looks(settings.all), curves, strict=True):
        if curve is None:
            continue
        axes.step(
            [0, *curve.times],
            [1, *curve.shares],
            look.dash,
            where="post",
            color=look.colour,
            label=setting.label,
        )
        ticks = [curve.after(time) for time in curve.censored]
        axes.plot(curve.censored, ticks, "|", color=look.colour, markersize=9)
    axes.set_ylim(*_WHOLE)
    axes.set(xlabel="optimizer steps", ylabel="share of seeds not solved")
    si_axis(axes)
    return drawing.drawn(figure)


def by_position(settings: Settings) -> Drawing:
    """Right tokens by their place in the answer."""
    drawing = Drawing(
        "accuracy_position",
        "Accuracy by position",
        "Decoded tokens that are the example's own, by their place in the answer, those that share "
        "a bucket at its first. Crosses: the same with the example's own tokens before them. "
        + SEEDS,
    )
    said, forced = (
        sorted((float(m[1]), m[0]) for m in tags_like(settings, rf"val/{n}_(\d+)(?:-\d+)?"))
        for n in ("accuracy_position", "forced_accuracy_position")
    )
    drawing = over_places(settings, drawing, said, "place in the answer", "share of tokens")
    if drawing.figure is None:
        return drawing
    (axes,) = drawing.figure.axes
    for setting, look in zip(settings.all, looks(settings.all), strict=True):
        crosses = {x: value for x, tag in forced if (value := setting.estimate(tag).interval)}
        means = [found.mean for found in crosses.values()]
        axes.plot([*crosses], means, "x", color=look.colour)
    keep_within(axes, 0, 1)
    places = [place for place, _ in said]
    if places[-1] > 16:  # from there on places share buckets that double: 17-32, 33-64, ..
        doubling_axis(axes, [x for x in places if x in (1, 2, 4, 8) or x > 16])
    else:
        axes.set_xticks(places)
    return drawing


def by_group(settings: Settings) -> list[Drawing]:
    """Right tokens by what the task groups them by, as a distance; a figure for each such thing."""
    found: dict[str, list[tuple[float, str]]] = {}
    for m in tags_like(settings, rf"val/accuracy_(?!(?:{_NO_GROUPS})_\d)(\w+?)_(\d+)(?:-\d+)?"):
        found.setdefault(m[1], []).append((float(m[2]), m[0]))
    drawings = []
    for name, places in found.items():
        drawing = Drawing(
            f"accuracy_{name}",
            f"Accuracy by {name.replace('_', ' ')}",
            "Decoded tokens that are the example's own, over buckets that double, at each one's "
            f"first. {SEEDS}",
        )
        drawing = over_places(settings, drawing, sorted(places), name, "share of tokens")
        if drawing.figure is not None:
            (axes,) = drawing.figure.axes
            keep_within(axes, 0, 1)
            doubling_axis(axes, sorted({place for place, _ in places}))
            drawings.append(drawing)
    return drawings
