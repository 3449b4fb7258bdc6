"""Figures over prediction depths, the weight of their losses, positions and distances."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweeps.report.comparable import meaning, predicts_tokens
from sweeps.report.metrics import LOSS, PER_STEP, SPEEDUP
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.statistics import Interval
from sweeps.report.style import (
    QUIET,
    SEEDS,
    Drawing,
    bars,
    canvas,
    doubling_axis,
    keep_to_shares,
    keep_within,
    key_to,
    looks,
)

Line = Mapping[Any, Interval]
"""Means and intervals of one setting, by their x coordinate."""

# Figure -> title, caption, a pattern of tags whose group is the x coordinate, the axes' names.
_LONG_RANGE = {
    "loss_position": (
        "Loss by position in the window",
        "Validation loss of depth 0 over buckets of positions that double, at each one's first. ",
        r"val/loss_position_(\d+)(?:-\d+)?",
        ("tokens read", "nats per token"),
    ),
    "context_gain": (
        "What more context is worth",
        "Loss of the same targets when the last c tokens are all that the model reads, minus that "
        "with the whole window. ",
        r"val/context_gain_(\d+)",
        ("c, tokens", "nats per token (the more, the more context helps)"),
    ),
    "natural_repeats": (
        "Accuracy on repeats",
        "Depth 0, on targets whose preceding 8 bytes occurred before in the window, by the "
        "distance of the last occurrence, at each class's largest; at 1 the control, whose bytes "
        "did not occur. ",
        r"val/accuracy_(?:no_repeat|repeat_\d+-(\d+))",
        ("tokens back", "right tokens (more is better)"),
    ),
    "random_repeats": (
        "Accuracy on repeated random tokens",
        "Depth 0, on the second half of a sequence of random ids and its copy. ",
        r"val/accuracy_random_repeat_(\d+)",
        ("period, tokens", "right tokens (more is better)"),
    ),
    "acceptance_position": (
        "Acceptance by position",
        "First drafts of a pass that the greedy verify loop accepts, by the draft's position in "
        "the text, at each bucket's first. ",
        r"decode/acceptance_at_(\d+)-\d+",
        ("tokens read", "accepted drafts (more is better)"),
    ),
    "acceptance_entropy": (
        "Acceptance by entropy",
        "First drafts of a pass that the greedy verify loop accepts, by the entropy of the main "
        "prediction that judges them, at each bin's lower end. ",
        r"decode/acceptance_entropy_([\d.]+)-\S+",
        ("nats", "accepted drafts (more is better)"),
    ),
}
_NO_GROUPS = "depth|position|repeat|random_repeat"  # other tags of the form accuracy_.._NUMBER


def place_figures(settings: Settings) -> dict[str, list[Drawing]]:
    """The drawings by subject: ``task``, ``depth`` and ``long range``."""
    drawn = {
        "task": [by_position(settings), *by_group(settings)] if settings.is_task else [],
        "depth": [
            by_depth(settings, "loss"),
            by_depth(settings, "agreement"),
            against_depth(settings, PER_STEP),
            against_depth(settings, SPEEDUP),
            against_lambda(settings, LOSS, "main-depth validation loss"),
            against_lambda(settings, "val/loss_depth_1", "validation loss of depth 1"),
        ],
    }
    return {**drawn, "long range": long_range(settings)}


def over_places(
    drawing: Drawing,
    settings: list[Setting],
    lines: Sequence[Line],
    axes_names: tuple[str, str],
    *,
    apart: float = 0.0,
    lacking: str = "no finished run measured it",
) -> Drawing:
    """Draw one line per setting.

    Args:
        drawing: the drawing that gets the figure.
        settings: all settings, or stand-ins for families of settings.
        lines: one per setting; empty lines are left out.
        axes_names: names of the x and y axes.
        apart: width over which settings are spread, so that equal values do not hide each other.
        lacking: the reason given if all lines are empty.
    """
    shown = [s for s, line in zip(settings, lines, strict=True) if line]
    if not shown:
        return drawing.lacking(lacking)
    figure, axes = canvas(key_to(settings, shown))
    for at, (setting, line, look) in enumerate(zip(settings, lines, looks(settings), strict=True)):
        bars(axes, line, look, setting.name, apart * ((at + 0.5) / len(settings) - 0.5))
    axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
    return drawing.drawn(figure)


def by_depth(settings: Settings, rate: str) -> Drawing:
    """Loss or agreement of every prediction depth."""
    loss = rate == "loss"
    first = 0 if loss else 1
    caption = (
        "Validation loss of every depth; depth 0 predicts the next token. "
        if loss
        else "Lines: teacher-forced agreement of a depth's choice with the main model's choice of "
        "the same token. Crosses: drafts accepted at that position in the real verify loop. "
    )
    drawing = Drawing(
        f"{rate}_depth", f"{rate.capitalize()} per depth", caption + _teacher_forced(settings)
    )
    deepest = max((s.depth or 0 for s in settings.all), default=0)
    tags = [(k, f"val/{rate}_depth_{k}") for k in range(first, deepest + 1)]
    lines = [_line(s, tags if predicts_tokens(s) else tags[: 1 - first]) for s in settings.all]
    names = "depth", "nats per token (lower is better)" if loss else "tokens (more is better)"
    lacking = f"no finished run has val/{rate}_depth_{first}"
    drawing = over_places(drawing, settings.all, lines, names, apart=0.3, lacking=lacking)
    if drawing.figure is not None:
        (axes,) = drawing.figure.axes
        axes.set_xticks([k for k, _ in tags])
        if not loss:
            accepted = [(k, f"decode/acceptance_position_{k}") for k, _ in tags]
            _crosses(drawing, settings, accepted, apart=0.3)
            keep_to_shares(axes)
    return drawing


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
        + SEEDS,
    )
    families = _families(settings, "mtp.depth")
    lines = [
        {s.depth: found for s in members if s.depth and (found := s.estimate(tag).interval)}
        for _, members in families
    ]
    names = "D", f"{'tokens per verify pass' if per_step else 'times as fast'} (more is better)"
    lacking = f"no finished run has {tag}"
    standins = [standin for standin, _ in families]
    drawing = over_places(drawing, standins, lines, names, lacking=lacking)
    if drawing.figure is not None:
        (axes,) = drawing.figure.axes
        deepest = max(depth for line in lines for depth in line)
        ideal = [k + 1 if per_step else 1 for k in range(deepest + 1)]
        axes.plot(range(deepest + 1), ideal, ":", color=QUIET, linewidth=1.2)
        if any(setting.depth == 0 for setting in settings.all):
            axes.plot(0, 1, "o", color=QUIET, markerfacecolor="none")
        keep_within(axes, 0, math.inf)
        axes.set_xticks(range(deepest + 1))
    return drawing


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
    place: dict[str, Any] = {
        text: value if numbers else i for i, (text, value) in enumerate(weights.items())
    }
    families = _families(settings, "mtp_lambda")
    lines = []
    for _, members in families:
        line = {place[show(s.config.get("mtp_lambda"))]: s.estimate(tag).interval for s in members}
        lines.append({x: found for x, found in sorted(line.items()) if found})
    names, lacking = ("lambda", "nats per token (lower is better)"), f"no finished run has {tag}"
    standins = [standin for standin, _ in families]
    drawing = over_places(drawing, standins, lines, names, lacking=lacking)
    if drawing.figure is not None:
        drawing.figure.axes[0].set_xticks(list(place.values()), list(place))
    return drawing


def long_range(settings: Settings) -> list[Drawing]:
    """The curves for which a finished run has numbers; nothing if ``long_range`` was off."""
    curves = (_long_range(settings, name) for name in _LONG_RANGE)
    return [drawing for drawing in curves if drawing.figure is not None]


def _long_range(settings: Settings, name: str) -> Drawing:
    title, caption, pattern, names = _LONG_RANGE[name]
    places = _places(settings, pattern)
    lines = [_line(setting, places) for setting in settings.all]
    drawing = over_places(Drawing(name, title, caption + SEEDS), settings.all, lines, names)
    if drawing.figure is not None and name != "acceptance_entropy":
        doubling_axis(drawing.figure.axes[0], sorted({place for place, _ in places}))
    return drawing


def by_position(settings: Settings) -> Drawing:
    """Accuracy by position in the answer."""
    drawing = Drawing(
        "accuracy_position",
        "Accuracy by position",
        "Decoded tokens that are the example's own, by their place in the answer, those that share "
        "a bucket at its first. Crosses: the same with the example's own tokens before them. "
        + SEEDS,
    )
    said, forced = (
        _places(settings, rf"val/{n}_(\d+)(?:-\d+)?")
        for n in ("accuracy_position", "forced_accuracy_position")
    )
    lines = [_line(setting, said) for setting in settings.all]
    names = "place in the answer", "right tokens (more is better)"
    drawing = over_places(drawing, settings.all, lines, names)
    if drawing.figure is not None:
        (axes,) = drawing.figure.axes
        _crosses(drawing, settings, forced)
        keep_to_shares(axes)
        places = [place for place, _ in said]
        if places[-1] > 16:  # later positions share buckets that double: 17-32, 33-64, ..
            doubling_axis(axes, [x for x in places if x in (1, 2, 4, 8) or x > 16])
        else:
            axes.set_xticks(places)
    return drawing


def by_group(settings: Settings) -> list[Drawing]:
    """Accuracy by each quantity that the task groups tokens by, such as a distance."""
    pattern = rf"val/accuracy_(?!(?:{_NO_GROUPS})_\d)(\w+?)_(\d+)(?:-\d+)?"
    found: dict[str, list[tuple[float, str]]] = {}
    for m in _matches(settings, pattern):
        found.setdefault(m[1], []).append((float(m[2]), m[0]))
    drawings = []
    for name, places in found.items():
        drawing = Drawing(
            f"accuracy_{name}",
            f"Accuracy by {name.replace('_', ' ')}",
            "Decoded tokens that are the example's own, over buckets that double, at each one's "
            f"first. {SEEDS}",
        )
        lines = [_line(setting, sorted(places)) for setting in settings.all]
        drawing = over_places(drawing, settings.all, lines, (name, "right tokens (more is better)"))
        if drawing.figure is not None:
            (axes,) = drawing.figure.axes
            keep_to_shares(axes)
            doubling_axis(axes, sorted({place for place, _ in places}))
            drawings.append(drawing)
    return drawings


def _crosses(
    drawing: Drawing, settings: Settings, tags: list[tuple[Any, str]], *, apart: float = 0.0
) -> None:
    """Mark the means of other tags at the x coordinates of the lines."""
    assert drawing.figure is not None
    count = len(settings.all)
    for at, (setting, look) in enumerate(zip(settings.all, looks(settings.all), strict=True)):
        line, aside = _line(setting, tags), apart * ((at + 0.5) / count - 0.5)
        means = [found.mean for found in line.values()]
        drawing.figure.axes[0].plot([x + aside for x in line], means, "x", color=look.color)


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


def _families(settings: Settings, key: str) -> list[tuple[Setting, list[Setting]]]:
    """Families of settings that differ only in one key, with a stand-in for the shared keys."""
    families: dict[str, tuple[Setting, list[Setting]]] = {}
    for setting in settings.all:
        shared = {k: value for k, value in setting.values.items() if k != key}
        standin = Setting(values=shared, config={})
        families.setdefault(standin.label, (standin, []))[1].append(setting)
    return list(families.values())
