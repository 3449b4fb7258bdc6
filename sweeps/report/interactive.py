"""What a page's script needs to know of its figures: where their points are, and what they say.

A figure stays the SVG that it is. Every setting's marks get a name in it, by which the script hides
them, and the legend's entries become switches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.report.style import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

# In front of the label of one seed's line, which no legend lists.
SEED = "_"
_POINTS = 72  # an inch of an SVG


def mark(figure: Figure, labels: Sequence[str]) -> None:
    """Name the marks of every setting in a figure, before it is saved.

    Args:
        figure: with its settings' labels at what it draws.
        labels: of all settings, whose places in it are the names' numbers.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    short = {brief(label): number for label, number in numbers.items()}
    parts = itertools.count()  # no two ids are equal
    for axes in figure.axes:
        for label, artists in _labelled(axes):
            if (number := numbers.get(label.removeprefix(SEED))) is not None:
                for artist in artists:
                    artist.set_gid(f"series-{number}-{next(parts)}")
    for legend in figure.legends:
        for text, handle in zip(legend.get_texts(), legend.get_lines(), strict=True):
            if (number := short.get(text.get_text())) is not None:
                for artist in (text, handle):
                    artist.set_gid(f"switch-{number}-{next(parts)}")


def points_of(figure: Figure, labels: Sequence[str]) -> dict[str, Any]:
    """Where the points of a saved figure are.

    Args:
        figure: drawn, so that it is laid out.
        labels: as in :func:`mark`.

    Returns:
        ``x`` and ``y``, what the axes say; ``box``, where they are in the SVG, left, top, right,
        bottom, with their limits ``xlim`` and ``ylim``; and ``points``: the setting's number, the
        place in the SVG, its values, and the interval along each where it has one: half of its
        width, or its ends where these are not equally far.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    height = figure.get_figheight() * _POINTS
    found: list[list[Any]] = []
    for axes in figure.axes:
        for container in axes.containers:
            number = numbers.get(str(container.get_label()))
            line = getattr(container, "lines", [None])[0]
            if number is not None and line is not None:
                for point in _points(line, axes, height):
                    found.append([number, *point, *_intervals(container, point[2:])])
        within = {id(lines[0]) for c in axes.containers if (lines := getattr(c, "lines", None))}
        for line in axes.lines:
            number = numbers.get(str(line.get_label()))
            if number is not None and id(line) not in within:
                found += [[number, *point, None, None] for point in _points(line, axes, height)]
    axes = figure.axes[0]
    scale = _scale(axes)
    edges = [axes.bbox.x0 * scale, height - axes.bbox.y1 * scale, axes.bbox.x1 * scale]
    return {
        "x": axes.get_xlabel(),
        "y": axes.get_ylabel(),
        "box": [round(edge, 1) for edge in (*edges, height - axes.bbox.y0 * scale)],
        "xlim": list(map(float, axes.get_xlim())),
        "ylim": list(map(float, axes.get_ylim())),
        "points": found,
    }


def _scale(axes: Axes) -> float:
    """SVG units a pixel."""
    return _POINTS / axes.get_figure(root=True).dpi  # type: ignore[union-attr]


def _labelled(axes: Axes) -> Iterator[tuple[str, list[Any]]]:
    for container in axes.containers:
        yield str(container.get_label()), list(container.get_children())
    for line in axes.lines:
        yield str(line.get_label()), [line]


def _points(line: Line2D, axes: Axes, height: float) -> Iterator[tuple[float, float, float, float]]:
    """Place in the SVG and values of a line's points that the axes show."""
    scale = _scale(axes)
    xs, ys = (list(map(float, data)) for data in (line.get_xdata(), line.get_ydata()))  # type: ignore[arg-type]
    for x, y in zip(xs, ys, strict=True):
        right, up = axes.transData.transform((x, y))
        if axes.bbox.contains(right, up):
            yield round(right * scale, 1), round(height - up * scale, 1), x, y


def _intervals(container: Any, at: tuple[float, float]) -> list[float | list[float] | None]:
    """The intervals along x, and along y, of the point at some values; see :func:`points_of`."""
    found: list[float | list[float] | None] = [None, None]
    bars = container.lines[2] if len(container.lines) > 2 else ()
    for collection in bars:
        for (x0, y0), (x1, y1) in collection.get_segments():
            if y0 == y1 == at[1] and min(x0, x1) <= at[0] <= max(x0, x1) and x0 != x1:
                found[0] = _interval(x0, x1, at[0])
            if x0 == x1 == at[0] and min(y0, y1) <= at[1] <= max(y0, y1) and y0 != y1:
                found[1] = _interval(y0, y1, at[1])
    return found


def _interval(start: float, end: float, middle: float) -> float | list[float]:
    low, high = sorted((float(start), float(end)))
    half = (high - low) / 2
    return half if abs(low + half - middle) <= 1e-6 * half else [low, high]
