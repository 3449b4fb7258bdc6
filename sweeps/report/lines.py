"""Figures over prediction depths, the weight of their losses, positions and distances."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sweeps.report.chart import QUIET, SEEDS, Chart, Drawing, key_to, looks, reach_of
from sweeps.report.comparable import meaning, predicts_tokens
from sweeps.report.metrics import LOSS, PER_STEP, SPEEDUP
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.statistics import Interval

RIGHT = "right tokens (more is better)"
NATS = "nats per token (lower is better)"

Line = Mapping[Any, Interval]
"""Means and intervals of one setting, by their x coordinate."""


@dataclass(frozen=True)
class Places:
    """A figure of one line per setting over the numbers in its tags."""

    title: str  # the title
    caption: str  # what is shown
    pattern: str  # the tags; their group is the x coordinate, 1 where it matches nothing
    names: tuple[str, str]  # names of the x and y axes
    # `double` for a scale on which positions double, `few` for that if there are more than 16,
    # `each` for a tick at every place, or empty.
    axis: str = "double"
    share: bool = False  # whether the values are shares
    crosses: str = ""  # the same of further tags, marked without intervals
    # Whether the places are depths, whose numbers do not compare between all heads.
    of_depths: bool = False


DEPTHS = {
    "loss_depth": Places(
        "Loss per depth",
        "Validation loss of every depth; depth 0 predicts the next token. ",
        r"val/loss_depth_(\d+)",
        ("depth", NATS),
        axis="each",
        of_depths=True,
    ),
    "agreement_depth": Places(
        "Agreement per depth",
        "Lines: teacher-forced agreement of a depth's choice with the main model's choice of the "
        "same token. Crosses: drafts accepted at that position in the real verify loop. ",
        r"val/agreement_depth_(\d+)",
        ("depth", "tokens (more is better)"),
        axis="each",
        share=True,
        crosses=r"decode/acceptance_position_(\d+)",
        of_depths=True,
    ),
}
BY_POSITION = Places(
    "Accuracy by position",
    "Decoded tokens that equal the example's, by their position in the answer; a bucket of "
    "positions is drawn at its first. Crosses: the same after the example's own tokens. ",
    r"val/accuracy_position_(\d+)(?:-\d+)?",
    ("position in the answer", RIGHT),
    axis="few",
    share=True,
    crosses=r"val/forced_accuracy_position_(\d+)(?:-\d+)?",
)
LONG_RANGE = {
    "loss_position": Places(
        "Loss by position in the window",
        "Validation loss of depth 0 in buckets of positions that double, drawn at their first. ",
        r"val/loss_position_(\d+)(?:-\d+)?",
        ("tokens read", "nats per token"),
    ),
    "context_gain": Places(
        "What more context is worth",
        "Loss of the same targets when the last c tokens are all that the model reads, minus that "
        "with the whole window. ",
        r"val/context_gain_(\d+)",
        ("c, tokens", "nats per token (higher: context helps more)"),
    ),
    "natural_repeats": Places(
        "Accuracy on repeats",
        "Depth 0, on targets whose preceding 8 bytes occurred before in the window, by the "
        "distance of the last occurrence, drawn at the largest of each class. At 1: the control, "
        "targets whose bytes did not occur before. ",
        r"val/accuracy_(?:no_repeat|repeat_\d+-(\d+))",
        ("tokens back", RIGHT),
    ),
    "random_repeats": Places(
        "Accuracy on repeated random tokens",
        "Depth 0, on the second half of a sequence of random ids and its copy. ",
        r"val/accuracy_random_repeat_(\d+)",
        ("period, tokens", RIGHT),
    ),
    "acceptance_position": Places(
        "Acceptance by position",
        "First drafts of a pass that the greedy verify loop accepts, by the draft's position in "
        "the text, drawn at the first of each bucket. ",
        r"decode/acceptance_at_(\d+)-\d+",
        ("tokens read", "accepted drafts (more is better)"),
    ),
    "acceptance_entropy": Places(
        "Acceptance by entropy",
        "First drafts of a pass that the greedy verify loop accepts, by the entropy of the main "
        "prediction that verifies them, drawn at the lower end of each bin. ",
        r"decode/acceptance_entropy_([\d.]+)-\S+",
        ("nats", "accepted drafts (more is better)"),
        axis="",
    ),
}
# Tags of the task's own groups, such as distances; other tags have the same form.
_GROUPS = r"val/accuracy_(?!(?:depth|position|repeat|random_repeat)_\d)(\w+?)_(\d+)(?:-\d+)?"


def over_places(settings: Settings, name: str, spec: Places) -> Drawing:
    """Draw the lines of a specification."""
    tags, crosses = (_places(settings, one) for one in (spec.pattern, spec.crosses))
    caption = spec.caption + (_teacher_forced(settings) if spec.of_depths else SEEDS)
    drawing = Drawing(name, spec.title, caption)
    # The depths of a head that predicts no token have losses of another kind.
    main = [(place, tag) for place, tag in tags if not place]
    lines = [
        (s, _line(s, main if spec.of_depths and not predicts_tokens(s) else tags))
        for s in settings.all
    ]
    marked = [_line(setting, crosses) for setting in settings.all] if crosses else ()
    apart = 0.3 if spec.of_depths else 0.0
    chart = _chart_of(settings, lines, spec.names, apart=apart, crosses=marked)
    if chart is None:
        return drawing.lacking("no finished run measured it")
    places = sorted({place for place, _ in tags})
    if spec.share:
        chart.percent("y", whole=False)
    if spec.axis == "few" and places[-1] > 16:  # later buckets double: 17-32, 33-64, ..
        chart.doubling_axis([x for x in places if x in (1, 2, 4, 8) or x > 16])
    elif spec.axis == "double":
        chart.doubling_axis(places)
    elif spec.axis:
        chart.axes.set_xticks(places)
    return drawing.drawn(chart)


def _chart_of(
    settings: Settings,
    lines: Sequence[tuple[Setting, Line]],
    names: tuple[str, str],
    *,
    apart: float = 0.0,
    crosses: Sequence[Line] = (),
) -> Chart | None:
    """A chart with one line per setting; None if all lines are empty.

    Args:
        lines: all settings, or stand-ins for families of them, with their lines, which may be
            empty.
        names: of the x and y axes.
        apart: width over which settings are spread, so that equal values do not hide each other.
        crosses: means that are marked by crosses, per setting.
    """
    every = [setting for setting, _ in lines]
    shown = [setting for setting, line in lines if line]
    if not shown:
        return None
    chart = Chart(key_to(every, shown), names=settings.names)
    look_of = looks(every)
    for at, (setting, line) in enumerate(lines):
        aside, look = apart * ((at + 0.5) / len(lines) - 0.5), look_of[setting]
        if line:
            xs, ys = [x + aside for x in line], [found.mean for found in line.values()]
            style = {"linestyle": look.dash, "elinewidth": 1}
            chart.draw(setting.name, look, xs, ys, y_reach=reach_of(line.values()), **style)
        if crosses:
            xs, ys = [x + aside for x in crosses[at]], [f.mean for f in crosses[at].values()]
            chart.axes.plot(xs, ys, "x", color=look.color)
    chart.axes.set(xlabel=names[0], ylabel=names[1])
    return chart


def by_group(settings: Settings) -> list[Drawing]:
    """Accuracy by each quantity that the task groups tokens by, such as a distance."""
    names = dict.fromkeys(match[1] for match in _matches(settings, _GROUPS))
    caption = "Decoded tokens that equal the example's, in buckets that double, drawn at their "
    return [
        over_places(
            settings,
            f"accuracy_{name}",
            Places(
                f"Accuracy by {name.replace('_', ' ')}",
                f"{caption}first. ",
                rf"val/accuracy_{name}_(\d+)(?:-\d+)?",
                (name, RIGHT),
                share=True,
            ),
        )
        for name in names
    ]


def long_range(settings: Settings) -> list[Drawing]:
    """The curves for which a finished run has numbers; nothing if ``long_range`` was off."""
    curves = (over_places(settings, name, spec) for name, spec in LONG_RANGE.items())
    return [drawing for drawing in curves if drawing.chart is not None]


# Of a tag: the figure's name, title and caption, what it counts, and the dotted value at a depth.
_AGAINST_DEPTH: dict[str, tuple[str, str, str, str, Callable[[int], int]]] = {
    PER_STEP: (
        "tokens_per_step",
        "Tokens per step against D",
        "Tokens emitted per verify pass of the greedy decoding loop, the model's own included. "
        "Dotted: D + 1, all drafts accepted. ",
        "tokens per verify pass",
        lambda depth: depth + 1,
    ),
    SPEEDUP: (
        "speedup",
        "Speed-up against D",
        "Wall-clock time of plain divided by that of speculative greedy decoding, one prompt at a "
        "time, on the machine of the run at that moment. Dotted: no gain. ",
        "times as fast",
        lambda depth: 1,
    ),
}


def against_depth(settings: Settings, tag: str) -> Drawing:
    """Tokens per step, or the measured speed-up, against D."""
    name, title, caption, what, dotted = _AGAINST_DEPTH[tag]
    caption += f"Without drafts it is 1 by definition (hollow). {SEEDS}"
    places = {show(s.depth): s.depth for s in settings.all if s.depth}
    axis_names = ("D", f"{what} (more is better)")
    drawing = Drawing(name, title, caption)
    chart = _against(settings, "mtp.depth", tag, places, axis_names)
    if chart is None:
        return drawing.lacking(f"no finished run has {tag}")
    deepest = max(s.depth for s in settings.all if s.depth and s.estimate(tag).interval)
    depths = range(deepest + 1)
    dots = [dotted(depth) for depth in depths]
    chart.axes.plot(depths, dots, ":", color=QUIET, linewidth=1.2)
    if any(setting.depth == 0 for setting in settings.all):
        chart.axes.plot(0, 1, "o", color=QUIET, markerfacecolor="none")
    chart.keep_within(math.inf)
    chart.axes.set_xticks(depths)
    return drawing.drawn(chart)


def against_lambda(settings: Settings, tag: str, what: str) -> Drawing:
    """The effect of lambda on a loss."""
    drawing = Drawing(
        f"lambda_{tag.rpartition('/')[2]}",
        f"Lambda's effect on the {what}",
        "One line for every setting of the other keys. "
        + (SEEDS if tag == LOSS else _teacher_forced(settings)),
    )
    weights = {show(s.config.get("mtp_lambda")): s.config.get("mtp_lambda") for s in settings.all}
    if len(weights) < 2:
        return drawing.lacking("mtp_lambda is not varied")
    numbers = all(isinstance(value, int | float) for value in weights.values())
    places = {text: value if numbers else i for i, (text, value) in enumerate(weights.items())}
    chart = _against(settings, "mtp_lambda", tag, places, ("lambda", NATS))
    if chart is None:
        return drawing.lacking(f"no finished run has {tag}")
    chart.axes.set_xticks(list(places.values()), list(places))
    return drawing.drawn(chart)


def _against(
    settings: Settings, key: str, tag: str, places: Mapping[str, Any], names: tuple[str, str]
) -> Chart | None:
    """A metric over one key, one line per family of settings that differ in nothing else.
    ``places`` has x coordinates by the key's values; settings of other values are left out."""
    families: dict[str, tuple[Setting, dict[Any, Interval]]] = {}
    for setting in settings.all:
        shared = {k: value for k, value in setting.values.items() if k != key}
        standin = Setting(values=shared, config={})
        _, line = families.setdefault(standin.label, (standin, {}))
        place = places.get(show(setting.config.get(key)))
        if place is not None and (found := setting.estimate(tag).interval):
            line[place] = found
    lines = [(standin, dict(sorted(line.items()))) for standin, line in families.values()]
    return _chart_of(settings, lines, names)


def of_depths(settings: Settings) -> list[Drawing]:
    """Losses and agreement by depth, decoding by D, and losses by lambda."""
    return [
        *(over_places(settings, name, spec) for name, spec in DEPTHS.items()),
        against_depth(settings, PER_STEP),
        against_depth(settings, SPEEDUP),
        against_lambda(settings, LOSS, "main-depth validation loss"),
        against_lambda(settings, "val/loss_depth_1", "validation loss of depth 1"),
    ]


def _teacher_forced(settings: Settings) -> str:
    return f"{SEEDS} {meaning(settings)}".rstrip()


def _line(setting: Setting, tags: Iterable[tuple[Any, str]]) -> dict[Any, Interval]:
    return {place: found for place, tag in tags if (found := setting.estimate(tag).interval)}


def _places(settings: Settings, pattern: str) -> list[tuple[float, str]]:
    """The matching tags with their numbers; 1 for a tag without a number."""
    return sorted((float(m[1] or 1), m[0]) for m in _matches(settings, pattern))


def _matches(settings: Settings, pattern: str) -> list[re.Match[str]]:
    tags = {tag for s in settings.all for run in s.done for tag in run.summary}
    return [match for tag in sorted(tags) if (match := re.fullmatch(pattern, tag))]
