"""The figures of a report. Each function draws one, or says what it lacks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.report.comparisons import Comparison, pareto
from sweeps.report.metrics import CURVE_AXES, DECODE_SPEED, FLOPS, LOSS, PER_STEP, SPEEDUP
from sweeps.report.read import Run
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.statistics import Interval
from sweeps.report.style import Drawing, Look, canvas, legend, looks, rows_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SEEDS = "Error bars are 95 % intervals over seeds; a point without one has one seed."
_THIN = 16  # with more settings, single seeds' curves would only blur the picture


def draw(settings: Settings, comparisons: Sequence[Comparison]) -> list[Drawing]:
    """Every figure that the runs have something to show in, in reading order."""
    drawings = [
        *(curve(settings, axis) for axis in CURVE_AXES),
        differences(comparisons),
        by_depth(settings, "loss"),
        by_depth(settings, "agreement"),
        against_depth(settings, PER_STEP),
        against_depth(settings, SPEEDUP),
        against_lambda(settings, LOSS, "main-depth validation loss"),
        against_lambda(settings, "val/loss_depth_1", "validation loss of depth 1"),
        *heat_maps(settings),
        front(settings, FLOPS),
        front(settings, DECODE_SPEED),
    ]
    return drawings


def curve(settings: Settings, axis: str) -> Drawing:
    """Main-depth validation loss against tokens, FLOPs or seconds."""
    tag, x_label = CURVE_AXES[axis]
    title = f"Loss against {axis if axis != 'flops' else 'FLOPs'}"
    drawing = Drawing(
        f"loss_{axis}",
        title,
        "Bold: mean over seeds, at the validations that all of them have reached. Thin: single "
        "seeds, running ones too. Losses above those of the last three quarters are cut off."
        + (" Seconds are the mean over seeds, and those of a shared machine." * (axis == "seconds")),
    )
    lines = [[_points(run, tag) for run in setting.runs] for setting in settings.all]
    if not any(points for runs in lines for points in runs):
        return _without(drawing, f"no run has logged {tag} and {LOSS}")
    figure, axes = canvas(legend_rows=rows_of([s.label for s in settings.all]))
    late = []
    furthest = max(x for runs in lines for points in runs for x, _ in points.values())
    for setting, look, runs in zip(settings.all, looks(settings.all), lines, strict=True):
        runs = [points for points in runs if points]
        for points in runs:
            late += [y for x, y in points.values() if x >= furthest / 4 and math.isfinite(y)]
            if len(runs) > 1 and len(settings.all) <= _THIN:
                xs, ys = zip(*points.values(), strict=True)
                axes.plot(xs, ys, look.dash, color=look.colour, linewidth=0.7, alpha=0.45)
        common = sorted(set.intersection(*(set(points) for points in runs))) if runs else []
        xs = [sum(points[step][0] for points in runs) / len(runs) for step in common]
        ys = [sum(points[step][1] for points in runs) / len(runs) for step in common]
        axes.plot(xs, ys, look.dash, color=look.colour, label=setting.label)
    if late and max(late) > min(late):
        margin = 0.08 * (max(late) - min(late))
        axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.set(xlabel=x_label, ylabel="nats per token")
    _si(axes)
    legend(figure, axes)
    return _with(drawing, figure)


def differences(comparisons: Sequence[Comparison]) -> Drawing:
    """Every setting's difference to its reference."""
    shown = [c for c in comparisons if c.result]
    drawing = Drawing(
        "differences",
        "Differences to the reference",
        "Main-depth validation loss of a setting minus its reference's, paired by seed, with the "
        "95 % interval of that one difference (not corrected for the number of tests). Left of "
        "the line is better; filled is beyond noise after Holm's correction.",
    )
    if not shown:
        return _without(drawing, "no two finished settings share a seed")
    figure, axes = canvas(legend_rows=max(len(shown) - 8, 0))
    axes.axvline(0, color="#8b949e", linewidth=1)
    for y, found in enumerate(reversed(shown)):
        assert found.result is not None
        difference = found.result.difference
        axes.errorbar(
            difference.mean,
            y,
            xerr=difference.half,
            fmt="o",
            color=_TONE,
            markerfacecolor=_TONE if found.differs else "none",
        )
    axes.set_yticks(range(len(shown)), [c.setting.label for c in reversed(shown)])
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlabel("difference in nats per token")
    return _with(drawing, figure)


_TONE = "#2f7fc1"


def by_depth(settings: Settings, rate: str) -> Drawing:
    """Loss or agreement of every prediction depth."""
    first = 0 if rate == "loss" else 1
    drawing = Drawing(
        f"{rate}_depth",
        f"{rate.capitalize()} per depth",
        "Validation loss of every depth; depth 0 predicts the next token. " + _SEEDS
        if rate == "loss"
        else "Lines: teacher-forced agreement of a depth's choice with the main model's choice of "
        "the same token. Crosses: drafts accepted at that position in the real verify loop. "
        + _SEEDS,
    )
    deepest = max((s.depth or 0 for s in settings.all), default=0)
    tags = {k: f"val/{rate}_depth_{k}" for k in range(first, deepest + 1)}
    lines = [_line(setting, tags) for setting in settings.all]
    if not any(lines):
        return _without(drawing, f"no finished run has val/{rate}_depth_{first}")
    shown = [s.label for s, line in zip(settings.all, lines, strict=True) if line]
    figure, axes = canvas(legend_rows=rows_of(shown))
    accepted = {k: f"decode/acceptance_position_{k}" for k in tags}
    count = len(settings.all)
    for at, (setting, look) in enumerate(zip(settings.all, looks(settings.all), strict=True)):
        # Side by side, so that equal values do not hide each other.
        aside = 0.3 * ((at + 0.5) / count - 0.5)
        _bars(axes, lines[at], look, setting.label, aside)
        if rate == "agreement":
            crosses = _line(setting, accepted)
            means = [found.mean for found in crosses.values()]
            axes.plot([k + aside for k in crosses], means, "x", color=look.colour)
    axes.set_xticks(list(tags))
    axes.set(xlabel="depth", ylabel="nats per token" if rate == "loss" else "share of tokens")
    legend(figure, axes)
    return _with(drawing, figure)


def against_depth(settings: Settings, tag: str) -> Drawing:
    """Tokens per step, or the measured speed-up, against D."""
    per_step = tag == PER_STEP
    drawing = Drawing(
        "tokens_per_step" if per_step else "speedup",
        "Tokens per step against D" if per_step else "Speed-up against D",
        (
            "Tokens emitted per verify pass of the greedy decoding loop, the model's own included. "
            "Dotted: D + 1, all drafts accepted. "
            if per_step
            else "Wall clock of plain over that of speculative greedy decoding, one prompt at a "
            "time, on the machine of the run at that moment. Dotted: no gain. "
        )
        + "Without drafts it is 1 by definition (hollow). "
        + _SEEDS,
    )
    points = [(s, s.estimate(tag).interval) for s in settings.all if s.depth]
    if not any(found for _, found in points):
        return _without(drawing, f"no finished run has {tag}")
    families = _families(settings, "mtp.depth")
    figure, axes = canvas(legend_rows=rows_of(list(families)))
    deepest = max(s.depth for s, found in points if found and s.depth)
    ideal = [k + 1 for k in range(deepest + 1)] if per_step else [1] * (deepest + 1)
    axes.plot(range(deepest + 1), ideal, ":", color="#8b949e", linewidth=1.2)
    for (name, members), look in zip(families.items(), looks(_firsts(families)), strict=True):
        line = {s.depth: s.estimate(tag).interval for s in members if s.depth}
        _bars(axes, {k: v for k, v in line.items() if v}, look, name, 0)
    if any(setting.depth == 0 for setting in settings.all):
        axes.plot(0, 1, "o", color="#8b949e", markerfacecolor="none")
    axes.set_xticks(range(deepest + 1))
    axes.set(xlabel="D", ylabel="tokens per verify pass" if per_step else "times as fast")
    if len(families) > 1:
        legend(figure, axes)
    return _with(drawing, figure)


def against_lambda(settings: Settings, tag: str, what: str) -> Drawing:
    """The effect of lambda on a loss."""
    drawing = Drawing(
        f"lambda_{tag.rpartition('/')[2]}",
        f"Lambda's effect on the {what}",
        "One line for every setting of the other keys. " + _SEEDS,
    )
    weights = {show(s.config.get("mtp_lambda")): s.config.get("mtp_lambda") for s in settings.all}
    if len(weights) < 2:
        return _without(drawing, "mtp_lambda is not varied")
    families = _families(settings, "mtp_lambda")
    figure, axes = canvas(legend_rows=rows_of(list(families)))
    numbers = all(isinstance(value, int | float) for value in weights.values())
    place = {text: value if numbers else i for i, (text, value) in enumerate(weights.items())}
    drawn = False
    for (name, members), look in zip(families.items(), looks(_firsts(families)), strict=True):
        line = {place[show(s.config.get("mtp_lambda"))]: s.estimate(tag).interval for s in members}
        known = {x: found for x, found in sorted(line.items()) if found}
        _bars(axes, known, look, name, 0)
        drawn |= bool(known)
    if not drawn:
        return _without(drawing, f"no finished run has {tag}")
    axes.set_xticks(list(place.values()), list(place))
    axes.set(xlabel="mtp_lambda", ylabel="nats per token")
    if len(families) > 1:
        legend(figure, axes)
    return _with(drawing, figure)


def heat_maps(settings: Settings) -> list[Drawing]:
    """Main-depth loss over two varied keys, one map for every value of the others."""
    keys = [key for key in settings.varied if _spread(settings.all, key) > 1]
    wanted = [key for key in ("mtp.depth", "mtp_lambda") if key in keys]
    pair = (wanted + [key for key in keys if key not in wanted])[:2]
    if len(pair) < 2:
        return []
    down, across = pair
    groups: dict[str, list[Setting]] = {}
    for setting in settings.all:
        rest = [f"{k}={show(v)}" for k, v in setting.values.items() if k not in pair]
        groups.setdefault(", ".join(rest), []).append(setting)
    maps = []
    for number, (name, members) in enumerate(groups.items()):
        if _spread(members, down) > 1 and _spread(members, across) > 1:
            maps.append(_heat_map(members, down, across, name, number))
    return maps


def _heat_map(members: list[Setting], down: str, across: str, name: str, number: int) -> Drawing:
    drawing = Drawing(
        f"heat_map_{number}" if number else "heat_map",
        f"{down} by {across}" + (f" at {name}" if name else ""),
        "Main-depth validation loss, mean over seeds and half of its 95 % interval; darker is "
        "lower, and better. A dash is a gap: no run, or one without a number.",
    )
    rows = list(dict.fromkeys(show(s.values[down]) for s in members))
    columns = list(dict.fromkeys(show(s.values[across]) for s in _sorted(members, across)))
    cells = {(show(s.values[down]), show(s.values[across])): s.estimate(LOSS).interval for s in members}
    known = [found.mean for found in cells.values() if found]
    if not known:
        return _without(drawing, f"no finished run has {LOSS}")
    low, high = min(known), max(known)
    figure, axes = canvas(legend_rows=max(len(rows) - 5, 0))
    axes.grid(False)
    grid = [[_mean(cells.get((row, column))) for column in columns] for row in rows]
    axes.imshow(grid, cmap="Blues_r", aspect="auto", vmin=low - 1e-12, vmax=high + 0.35 * (high - low) + 1e-12)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            found = cells.get((row, column))
            dark = found is not None and found.mean < low + 0.55 * (high - low)
            text = "–" if found is None else f"{found.mean:.4f}"
            if found is not None and found.half is not None:
                text += f"\n± {found.half:.4f}"
            tone = "#fefefe" if dark else "#10233a" if found is not None else None
            axes.text(x, y, text, ha="center", va="center", color=tone, fontsize=9)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=across, ylabel=down)
    return _with(drawing, figure)


def front(settings: Settings, tag: str) -> Drawing:
    """Pareto front of the main loss against what training or decoding costs."""
    cheap = tag == FLOPS
    drawing = Drawing(
        "pareto_flops" if cheap else "pareto_decoding",
        "Loss against training FLOPs" if cheap else "Loss against decoding speed",
        "Filled points, joined by the line, are those that no other setting beats in both "
        "(by their means: whether two points differ at all, the table of differences says). "
        + ("" if cheap else "Speed is of greedy decoding with drafts on the machine of the run. ")
        + _SEEDS,
    )
    found = [(s, s.estimate(tag).interval, s.estimate(LOSS).interval) for s in settings.all]
    points = [(s, cost, loss) for s, cost, loss in found if cost and loss]
    if not points:
        return _without(drawing, f"no finished run has {tag} and {LOSS}")
    sign = 1 if cheap else -1
    best = pareto([(sign * cost.mean, loss.mean) for _, cost, loss in points])
    figure, axes = canvas(legend_rows=rows_of([s.label for s, _, _ in points]))
    line = sorted((c.mean, v.mean) for (_, c, v), on in zip(points, best, strict=True) if on)
    axes.plot(*zip(*line, strict=True), color="#8b949e", linewidth=1.2)
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
    axes.set(xlabel=x_label, ylabel="nats per token")
    _si(axes)
    legend(figure, axes)
    return _with(drawing, figure)


def _points(run: Run, tag: str) -> dict[float, tuple[float, float]]:
    """(cost, loss) of a run's validations, by step."""
    return {row["step"]: (row[tag], row[LOSS]) for row in run.rows if tag in row and LOSS in row}


def _line(setting: Setting, tags: dict[int, str]) -> dict[int, Interval]:
    found = {k: setting.estimate(tag).interval for k, tag in tags.items()}
    return {k: value for k, value in found.items() if value}


def _bars(axes: Axes, line: dict[Any, Interval], look: Look, label: str, aside: float) -> None:
    if not line:
        return
    axes.errorbar(
        [x + aside for x in line],
        [found.mean for found in line.values()],
        yerr=[found.half or 0.0 for found in line.values()],
        fmt=look.marker,
        linestyle=look.dash,
        color=look.colour,
        elinewidth=1,
        label=label,
    )


def _families(settings: Settings, key: str) -> dict[str, list[Setting]]:
    """Settings that differ in one key alone, by what they have in common."""
    families: dict[str, list[Setting]] = {}
    for setting in settings.all:
        rest = ", ".join(f"{k}={show(v)}" for k, v in setting.values.items() if k != key)
        families.setdefault(rest or "all", []).append(setting)
    return families


def _firsts(families: dict[str, list[Setting]]) -> list[Setting]:
    """A stand-in for every family, which gets the family's look."""
    return [Setting(values={"family": name}, config={}) for name in families]


def _spread(settings: list[Setting], key: str) -> int:
    return len({show(setting.values.get(key)) for setting in settings})


def _sorted(settings: list[Setting], key: str) -> list[Setting]:
    number: Callable[[Any], bool] = lambda v: isinstance(v, int | float)  # noqa: E731
    return sorted(settings, key=lambda s: (0, s.values[key], "") if number(s.values[key]) else (1, 0, show(s.values[key])))


def _mean(found: Interval | None) -> float:
    return math.nan if found is None else found.mean


def _si(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _with(drawing: Drawing, figure: Any) -> Drawing:
    return Drawing(drawing.name, drawing.title, drawing.caption, figure)


def _without(drawing: Drawing, why: str) -> Drawing:
    return Drawing(drawing.name, drawing.title, drawing.caption, None, why)
