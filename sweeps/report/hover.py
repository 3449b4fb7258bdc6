"""Makes the page's figures interactive: a point shows its values under the pointer, and an entry of
the legend hides its setting.

The figures remain SVGs. Every setting's marks get ids by which the page's script hides them, and
every point gets a circle with a title, which browsers show as a tooltip.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.report.style import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Prefix of the label of one seed's line, which keeps it out of legends.
SEED = "_"
_POINTS = 72  # SVG points per inch


@dataclass(frozen=True)
class Point:
    """A point of a saved figure.

    Attributes:
        setting: the setting's number.
        at: (x, y) in the SVG, in points.
        says: the tooltip: the setting and its values, in lines.
    """

    setting: int
    at: tuple[float, float]
    says: str


def mark(figure: Figure, labels: Sequence[str]) -> None:
    """Name the marks of every setting in a figure, before it is saved.

    Args:
        figure: its artists have the settings' labels.
        labels: all settings' labels; their indices become the numbers in the ids.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    short = {brief(label): number for label, number in numbers.items()}
    parts = itertools.count()  # makes ids unique
    named = [
        (f"series-{numbers[label]}", artist)
        for axes in figure.axes
        for of, artist in _labelled(axes)
        if (label := of.removeprefix(SEED)) in numbers
    ]
    for legend in figure.legends:
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True):
            if (number := short.get(text.get_text())) is not None:
                named += [(f"switch-{number}", artist) for artist in (text, handle)]
    for name, artist in named:
        artist.set_gid(f"{name}-{next(parts)}")


def _labelled(axes: Axes) -> Iterator[tuple[str, Any]]:
    for container in axes.containers:
        yield from ((str(container.get_label()), child) for child in container.get_children())
    yield from ((str(line.get_label()), line) for line in axes.lines)


def points_of(figure: Figure, labels: Sequence[str]) -> list[Point]:
    """The points of all settings in a figure that was saved before, and so is laid out.

    Args:
        figure: a figure with one pair of axes.
        labels: as in :func:`mark`.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    (axes,) = figure.axes
    scale, height = _POINTS / figure.dpi, figure.get_figheight() * _POINTS
    bars: list[Any] = [c for c in axes.containers if getattr(c, "lines", None)]
    lines = {id(c.lines[0]): c for c in bars}
    containers = [(c.get_label(), c.lines[0], c) for c in lines.values()]
    alone = [(line.get_label(), line, None) for line in axes.lines if id(line) not in lines]
    found = []
    for label, line, container in [*containers, *alone]:
        number = numbers.get(str(label))
        if number is None:
            continue
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True):
            right, up = axes.transData.transform((x, y))
            if axes.bbox.contains(right, up):
                halves = _intervals(container, (x, y))
                said = [
                    f"{name}: {_digits(value)}{bar}"
                    for name, value, bar in zip(
                        map(_quantity, (axes.get_xlabel(), axes.get_ylabel())),
                        (x, y),
                        halves,
                        strict=True,
                    )
                    if name
                ]
                at = round(right * scale, 1), round(height - up * scale, 1)
                found.append(Point(number, at, "\n".join([labels[number], *said])))
    return found


def _quantity(label: str) -> str:
    """An axis label without its part in parentheses, such as ``(lower is better)``."""
    return label.partition(" (")[0]


def _intervals(container: Any, at: tuple[float, float]) -> list[str]:
    """The x and y intervals of a point as text; empty strings without intervals."""
    found = ["", ""]
    bars = () if container is None or len(container.lines) < 3 else container.lines[2]
    for collection in bars:
        for start, end in collection.get_segments():
            for axis in (0, 1):
                low, high = sorted((float(start[axis]), float(end[axis])))
                other = 1 - axis
                if (
                    low < high
                    and start[other] == end[other] == at[other]
                    and low <= at[axis] <= high
                ):
                    half = (high - low) / 2
                    even = abs(low + half - at[axis]) <= 1e-6 * half
                    ends = f" ({_digits(low)} to {_digits(high)})"
                    found[axis] = f" ± {_digits(half)}" if even else ends
    return found


def _digits(value: float) -> str:
    """Five digits, with commas between thousands."""
    value = float(f"{value:.5g}")
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.5g}"
