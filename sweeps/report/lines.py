"""Figures with one line per setting: over training, prediction depths, the weight of their losses,
positions and distances."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mtp_lightning.run.solved import EXACT
from sweeps.report.chart import MANY, QUIET, Chart, key_to, looks
from sweeps.report.comparable import predicts_tokens
from sweeps.report.compare import time_to_solve
from sweeps.report.drawing import Drawing, drawing_of
from sweeps.report.metrics import CHANCE, CURVE_AXES, LOSS, PER_STEP, SPEEDUP
from sweeps.report.names import sentence, texts
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.statistics import Interval

LONG_RANGE = (
    "loss_position",
    "context_gain",
    "natural_repeats",
    "random_repeats",
    "acceptance_position",
    "acceptance_entropy",
)
# Tags of the task's own groups, such as distances; other tags have the same form.
_GROUPS = r"val/accuracy_(?!(?:depth|position|repeat|random_repeat)_\d)(\w+?)_(\d+)(?:-\d+)?"

Line = Mapping[Any, Interval]
"""Means and intervals of one setting, by their x coordinate."""
Points = Mapping[float, tuple[float, float]]
"""The (x, y) of a run's validations, by step."""


def by_group(settings: Settings) -> list[Drawing]:
    """Accuracy by each quantity that the task groups tokens by, such as a distance."""
    drawings = []
    for group in dict.fromkeys(match[1] for match in _matches(settings, _GROUPS)):
        words = {"group": group, "words": group.replace("_", " ")}
        drawings.append(over_places(settings, "accuracy_group", name=f"accuracy_{group}", **words))
    return drawings


def long_range(settings: Settings) -> list[Drawing]:
    """The curves for which a finished run has numbers; none if ``long_range`` was off."""
    curves = (over_places(settings, name) for name in LONG_RANGE)
    return [drawing for drawing in curves if drawing.chart is not None]


def over_places(settings: Settings, kind: str, *, name: str = "", **values: str) -> Drawing:
    """One line per setting over the numbers in the tags of a figure in ``texts.yaml``. The other
    arguments are those of :func:`drawing_of`."""
    figure = texts("figures")[kind]
    drawing = drawing_of(settings, kind, name=name, **values)
    tags = _places(settings, figure["tags"].format(**values))
    crosses = _places(settings, figure.get("crosses", ""))
    of_depths, axis = figure.get("of_depths"), figure.get("axis")
    # The depths of a head that predicts no token have losses of another kind.
    main = [(place, tag) for place, tag in tags if not place]
    lines = [
        (s, _line(s, main if of_depths and not predicts_tokens(s) else tags)) for s in settings.all
    ]
    marked = [_line(setting, crosses) for setting in settings.all] if crosses else ()
    chart = _chart_of(settings, lines, apart=0.3 if of_depths else 0.0, crosses=marked)
    if chart is None:
        return drawing.lacking("no finished run measured it")
    places = sorted({place for place, _ in tags})
    if figure.get("share"):
        chart.percent("y", whole=False)
    if axis == "few" and places[-1] > 16:  # later buckets double: 17-32, 33-64, ..
        chart.doubling_axis([x for x in places if x in (1, 2, 4, 8) or x > 16])
    elif axis == "double":
        chart.doubling_axis(places)
    elif axis:
        chart.axes.set_xticks(places)
        if of_depths:
            chart.axes.set_xlim(places[0] - 0.5, places[-1] + 0.5)
    return drawing.drawn(chart)


def _chart_of(
    settings: Settings,
    lines: Sequence[tuple[Setting, Line]],
    *,
    apart: float = 0.0,
    crosses: Sequence[Line] = (),
) -> Chart | None:
    """A chart with one line per setting, or per family of settings; None if all lines are empty.

    Settings are spread over the width ``apart``, so that equal values do not hide each other;
    ``crosses`` has by setting the means that are marked by crosses.
    """
    all_settings = [setting for setting, _ in lines]
    nonempty = [setting for setting, line in lines if line]
    if not nonempty:
        return None
    chart = Chart(key_to(all_settings, nonempty), names=settings.names)
    look_of = looks(all_settings)
    for index, (setting, line) in enumerate(lines):
        offset, look = apart * ((index + 0.5) / len(lines) - 0.5), look_of[setting]
        if line:
            xs, style = [x + offset for x in line], {"linestyle": look.dash, "elinewidth": 1}
            chart.draw(setting.name, look, xs, [*line.values()], **style)
        if crosses:
            xs = [x + offset for x in crosses[index]]
            means = [estimate.mean for estimate in crosses[index].values()]
            chart.axes.plot(xs, means, "x", color=look.color)
    return chart


def against_depth(settings: Settings, tag: str) -> Drawing:
    """Tokens per pass, or the measured speed-up, against D."""
    drawing = drawing_of(settings, tag.removeprefix("decode/"))
    places = {show(s.depth): s.depth for s in settings.all if s.depth}
    chart = _against(settings, "mtp.depth", tag, places)
    if chart is None:
        return drawing.lacking(f"no finished run has {tag}")
    deepest = max(s.depth for s in settings.all if s.depth and s.estimate(tag).interval)
    depths = range(deepest + 1)
    dots = [depth + 1 if tag == PER_STEP else 1 for depth in depths]
    chart.axes.plot(depths, dots, ":", color=QUIET, linewidth=1.2)
    if any(setting.depth == 0 for setting in settings.all):
        chart.axes.plot(0, 1, "o", color=QUIET, markerfacecolor="none")
    chart.keep_within(math.inf)
    chart.axes.set_xticks(depths)
    return drawing.drawn(chart)


def against_lambda(settings: Settings, tag: str, loss: str) -> Drawing:
    """The effect of lambda on a loss."""
    extra = {"meaning": ""} if tag == LOSS else {}
    name = f"lambda_{tag.rpartition('/')[2]}"
    drawing = drawing_of(settings, "lambda", name=name, loss=loss, **extra)
    values = [s.values.get("mtp_lambda", s.config.get("mtp_lambda")) for s in settings.all]
    weights = {show(weight): weight for weight in values if weight is not None}
    if len(weights) < 2:
        return drawing.lacking("mtp_lambda is not varied")
    numbers = all(isinstance(value, int | float) for value in weights.values())
    places = {text: value if numbers else i for i, (text, value) in enumerate(weights.items())}
    chart = _against(settings, "mtp_lambda", tag, places)
    if chart is None:
        return drawing.lacking(f"no finished run has {tag}")
    chart.axes.set_xticks(list(places.values()), list(places))
    return drawing.drawn(chart)


def _against(settings: Settings, key: str, tag: str, places: Mapping[str, Any]) -> Chart | None:
    """A metric over one key, one line per family of settings that differ in nothing else.
    ``places`` has x coordinates by the key's values; settings of other values are left out."""
    families: dict[str, tuple[Setting, dict[Any, Interval]]] = {}
    for setting in settings.all:
        shared = {k: value for k, value in setting.values.items() if k != key}
        standin = Setting(values=shared, config={})
        _, line = families.setdefault(standin.label, (standin, {}))
        value = setting.values.get(key, setting.config.get(key))
        # Plain training has no weight of MTP, and is drawn at all of them.
        everywhere = key in setting.values and value is None
        xs = [*places.values()] if everywhere else [places.get(show(value))]
        if interval := setting.estimate(tag).interval:
            line.update({place: interval for place in xs if place is not None})
    lines = [(standin, dict(sorted(line.items()))) for standin, line in families.values()]
    return _chart_of(settings, lines)


def of_depths(settings: Settings) -> list[Drawing]:
    """Losses and agreement by depth, decoding by D, and losses by lambda."""
    return [
        over_places(settings, "loss_depth"),
        over_places(settings, "agreement_depth"),
        against_depth(settings, PER_STEP),
        against_depth(settings, SPEEDUP),
        against_lambda(settings, LOSS, "validation loss for the next token"),
        against_lambda(settings, "val/loss_depth_1", "validation loss of depth 1"),
    ]


def _line(setting: Setting, tags: Iterable[tuple[Any, str]]) -> dict[Any, Interval]:
    return {place: interval for place, tag in tags if (interval := setting.estimate(tag).interval)}


def _places(settings: Settings, pattern: str) -> list[tuple[float, str]]:
    """The matching tags with their numbers; 1 for a tag without a number."""
    return sorted((float(m[1] or 1), m[0]) for m in _matches(settings, pattern))


def _matches(settings: Settings, pattern: str) -> list[re.Match[str]]:
    tags = {tag for s in settings.all for run in s.done for tag in run.summary}
    return [match for tag in sorted(tags) if (match := re.fullmatch(pattern, tag))]


def curve(settings: Settings, axis: str) -> Drawing:
    """Validation loss for the next token against tokens, FLOPs or seconds."""
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
