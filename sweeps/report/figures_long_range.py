"""Figures of how far back the models look."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sweeps.report.settings import Settings
from sweeps.report.style import SEEDS, Drawing, bars, canvas, doubling_axis, key_to, looks

# Figure -> title, caption, the tags with the number that is their place, and the axes' names.
_CURVES = {
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
        ("c, tokens", "nats per token"),
    ),
    "natural_repeats": (
        "Accuracy on repeats",
        "Depth 0, on targets whose preceding 8 bytes occurred before in the window, by the "
        "distance of the last occurrence, at each class's largest; at 1 the control, whose bytes "
        "did not occur. ",
        r"val/accuracy_(?:no_repeat|repeat_\d+-(\d+))",
        ("tokens back", "share of tokens"),
    ),
    "random_repeats": (
        "Accuracy on repeated random tokens",
        "Depth 0, on the second half of a sequence of random ids and its copy. ",
        r"val/accuracy_random_repeat_(\d+)",
        ("period, tokens", "share of tokens"),
    ),
    "acceptance_position": (
        "Acceptance by position",
        "First drafts of a pass that the greedy verify loop accepts, by the draft's position in "
        "the text, at each bucket's first. ",
        r"decode/acceptance_at_(\d+)-\d+",
        ("tokens read", "share of drafts"),
    ),
    "acceptance_entropy": (
        "Acceptance by entropy",
        "First drafts of a pass that the greedy verify loop accepts, by the entropy of the main "
        "prediction that judges them, at each bin's lower end. ",
        r"decode/acceptance_entropy_([\d.]+)-\S+",
        ("nats", "share of drafts"),
    ),
}


def long_range(settings: Settings) -> list[Drawing]:
    """Every curve that a finished run has numbers for; no gap where ``long_range`` was not on."""
    drawings = (_curve(settings, name) for name in _CURVES)
    return [drawing for drawing in drawings if drawing.figure is not None]


def _curve(settings: Settings, name: str) -> Drawing:
    title, caption, pattern, (x_label, y_label) = _CURVES[name]
    drawing = Drawing(name, title, caption + SEEDS)
    places = sorted((float(m[1] or 1), m[0]) for m in tags_like(settings, pattern))
    drawing = over_places(settings, drawing, places, x_label, y_label)
    if drawing.figure is not None and name != "acceptance_entropy":
        doubling_axis(drawing.figure.axes[0], sorted({place for place, _ in places}))
    return drawing


def tags_like(settings: Settings, pattern: str) -> list[re.Match[str]]:
    """The tags of finished runs that match, in order."""
    tags = {tag for s in settings.all for run in s.done for tag in run.summary}
    return [match for tag in sorted(tags) if (match := re.fullmatch(pattern, tag))]


def over_places(
    settings: Settings,
    drawing: Drawing,
    places: Sequence[tuple[float, str]],
    x_label: str,
    y_label: str,
) -> Drawing:
    """A line for each setting: means and intervals of the tags at their places."""
    lines = [
        {x: value for x, tag in places if (value := setting.estimate(tag).interval)}
        for setting in settings.all
    ]
    shown = [s for s, line in zip(settings.all, lines, strict=True) if line]
    if not shown:
        return drawing.lacking("no finished run measured it")
    figure, axes = canvas(key_to(settings.all, shown))
    for setting, line, look in zip(settings.all, lines, looks(settings.all), strict=True):
        bars(axes, line, look, setting.label, 0)
    axes.set(xlabel=x_label, ylabel=y_label)
    return drawing.drawn(figure)
