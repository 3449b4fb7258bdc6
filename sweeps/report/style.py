"""The look of figures: a canvas, colors by the first varied key, and files that are readable on
paper, on light pages and on dark ones."""

from __future__ import annotations

import io
import math
import re
import textwrap
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sweeps.report.names import name_of
from sweeps.report.settings import Setting, show
from sweeps.report.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sweeps.report.hover import Point

# Distinguishable with red-green color blindness, on white and on black (after Okabe & Ito 2008).
COLORS = ("#2f7fc1", "#d9761e", "#1f9a73", "#c0559a", "#8a7a1d", "#6b6fd0", "#b5473c", "#3f8f9b")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 12  # the most settings that a legend lists one by one
_WIDE = 29  # labels of as many letters leave no room for a second column of the legend
INK, GRID, PAPER = "#24292f", "#d3d9e0", "#ffffff"
QUIET = "#8b949e"  # lines that belong to no setting

_NO_XML = re.compile(
    rb"[\x00-\x08\x0b\x0c\x0e-\x1f]"
)  # characters that XML forbids; a run's name may have them

WHOLE = (-0.03, 1.03)  # limits of an axis of shares
SEEDS = "Error bars are 95 % intervals over seeds; a point without one has one seed."

_RC: Any = {
    "font.family": "sans-serif",
    "font.size": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 1.7,
    "legend.columnspacing": 1.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "errorbar.capsize": 3,
    "axes.axisbelow": True,
    # A dollar sign in a setting's name does not begin a formula.
    "text.parse_math": False,
    # Text stays text, so it can be searched and takes the page's font.
    "svg.fonttype": "none",
    "svg.hashsalt": "mtp-lightning",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: the name of its files.
        title: the title above it.
        caption: an explanation of what is shown and how it was computed.
        figure: the figure; None if data is missing.
        why: what is missing.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None = None
    why: str = ""

    def drawn(self, figure: Figure) -> Drawing:
        return replace(self, figure=figure)

    def lacking(self, why: str) -> Drawing:
        return replace(self, why=why)


@dataclass(frozen=True)
class Look:
    """Color, line and marker of one setting."""

    color: str
    dash: Any
    marker: str


@contextmanager
def styled() -> Iterator[None]:
    """A context in which figures are drawn and saved in the report's look."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def looks(settings: list[Setting]) -> list[Look]:
    """Colors follow the first varied key, lines and markers the combination of the others."""
    first: dict[str, int] = {}
    others: dict[str, int] = {}
    found = []
    for setting in settings:
        head, rest = _halves(setting)
        a = first.setdefault(head, len(first))
        b = others.setdefault(rest, len(others)) + a // len(COLORS)
        # Four dashes and seven markers make 28 different combinations.
        dash, marker = DASHES[b % len(DASHES)], MARKERS[b % len(MARKERS)]
        found.append(Look(COLORS[a % len(COLORS)], dash, marker))
    return found


def looks_of(settings: list[Setting]) -> dict[int, Look]:
    """:func:`looks` by the settings' ``id``."""
    return {id(s): look for s, look in zip(settings, looks(settings), strict=True)}


def key_to(settings: list[Setting], shown: list[Setting]) -> list[tuple[str, Look]]:
    """The legend of ``shown``: one entry per setting. If there are many, one per value of the first
    key (its color) and one per combination of the other keys (dash and marker)."""
    pairs = [
        (setting, look)
        for setting, look in zip(settings, looks(settings), strict=True)
        if any(setting is one for one in shown)
    ]
    if len(pairs) <= MANY or len(shown[0].values) < 2:
        return [(setting.name, look) for setting, look in pairs]
    colors = {_halves(s)[0]: Look(look.color, "-", "") for s, look in pairs}
    lines = {_halves(s)[1]: Look(QUIET, look.dash, look.marker) for s, look in pairs}
    return [*colors.items(), *lines.items()]


def _halves(setting: Setting) -> tuple[str, str]:
    parts = [name_of(key, show(value)) for key, value in setting.values.items()]
    return ", ".join(parts[:1]), ", ".join(parts[1:])


def canvas(key: list[tuple[str, Look]] | None = None, *, rows: int = 0) -> tuple[Figure, Axes]:
    """An empty figure.

    Args:
        key: the legend below the figure, in one or two columns; a single entry is not shown.
        rows: lines of text that need extra height, besides those of the legend.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    entries = [(brief(label), look) for label, look in key or []]
    entries = entries if len(entries) > 1 else []
    columns = 1 if any(len(label) >= _WIDE for label, _ in entries) else 2
    rows += math.ceil(len(entries) / columns)
    figure = Figure(figsize=(5.2, 3.3 + 0.2 * rows), layout="constrained", facecolor=PAPER)
    axes = figure.subplots()
    axes.set_facecolor("none")
    if entries:
        figure.legend(
            handles=[
                Line2D([], [], color=o.color, linestyle=o.dash, marker=o.marker, label=label)
                for label, o in entries
            ],
            loc="outside lower center",
            ncols=columns,
        )
    return figure, axes


def by_row(labels: list[str]) -> tuple[Figure, Axes]:
    """An empty figure with one row per label; the first is at the bottom, at y = 0."""
    labels = [brief(label, 36) for label in labels]
    if len(labels) <= MANY:
        labels = [textwrap.fill(label, 24) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, axes = canvas(rows=max(lines - 14, 0))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    return figure, axes


def brief(label: str, letters: int = 46) -> str:
    """A label in one line, shortened in the middle to fit into a figure."""
    label, half = " ".join(label.split()), letters // 2
    return label if len(label) <= letters else f"{label[:half]}…{label[-half:]}"


def bars(axes: Axes, line: Mapping[Any, Interval], look: Look, label: str, aside: float) -> None:
    """Draw one setting's means with their intervals, by x coordinate."""
    if not line:
        return
    axes.errorbar(
        [x + aside for x in line],
        [found.mean for found in line.values()],
        yerr=[*zip(*(found.reach for found in line.values()), strict=True)],
        fmt=look.marker,
        linestyle=look.dash,
        color=look.color,
        elinewidth=1,
        label=label,
    )


def si_axis(axes: Axes) -> None:
    """Give the x axis few ticks, written as 15 M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def share_axis(axes: Axes, which: str) -> None:
    """Show 0 % to 100 % on the ``x`` or ``y`` axis."""
    _percent(axes, which)
    axes.set(**{f"{which}lim": WHOLE})


def keep_to_shares(axes: Axes) -> None:
    """Show the ``y`` axis in percent, as far as the values need it within 0 % to 100 %."""
    _percent(axes, "y")
    keep_within(axes, 0, 1)


def _percent(axes: Axes, which: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def doubling_axis(axes: Axes, places: Sequence[float]) -> None:
    """Give the x axis a base-2 logarithmic scale with ticks at the places."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def keep_within(axes: Axes, low: float, high: float) -> None:
    """Cut the y axis at the possible values; an interval may reach beyond them."""
    bottom, top = axes.get_ylim()
    room = 0.03 * (min(top, high) - max(bottom, low))
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG on white, for slides and TensorBoard."""
    return _save(figure, format="png", dpi=160)


def as_svg(figure: Figure, *, of: str | None = None) -> bytes:
    """The figure as an SVG file on white; ``of`` in its metadata names its source."""
    svg = _save(figure, format="svg", metadata={"Date": None, "Identifier": of})
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}".encode(), svg)


def as_inline(svg: bytes, *, name: str, label: str, points: Iterable[Point] = ()) -> str:
    """The SVG as an element of a page. It takes the page's text color, and its ids get its name as
    a prefix. Inline styles become attributes, because the page's content security policy forbids
    them. Every point gets a circle with its values as a tooltip."""
    root = ElementTree.fromstring(svg)
    for parent in [*root.iter()]:
        for child in [*parent]:
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        given = {_local(key): value for key, value in element.attrib.items()}
        given |= _attributes(given.pop("style", ""))
        for key, value in given.items():
            if key in ("id", "href"):
                given[key] = re.sub("^#?", rf"\g<0>{name}-", value)
            elif value.startswith("url(#"):
                given[key] = value.replace("#", f"#{name}-", 1)
        element.attrib = given
    for point in points:
        x, y = map(str, point.at)
        given = {"cx": x, "cy": y, "r": "6", "class": f"point series-{point.setting}"}
        ElementTree.SubElement(
            ElementTree.SubElement(root, "circle", given), "title"
        ).text = point.says
    view = {"viewBox": root.attrib["viewBox"]}
    root.attrib = {"role": "img", "aria-label": label, "class": "figure", **view}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its XML namespace, as in HTML."""
    return name.rpartition("}")[2]


def _attributes(style: str) -> dict[str, str]:
    """A style's declarations as presentation attributes, without the font's name."""
    found = {}
    for declaration in filter(None, style.split(";")):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := re.search(r"[\d.]+px", value)):
            key, value = "font-size", size[0]
        if key != "font-family":
            found[key] = {INK: "currentColor", GRID: "var(--grid)"}.get(value, value)
    if found.get("fill") == PAPER:
        found["fill"] = "none"
    return found


def _save(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, **options)
    figure.set_layout_engine("none")  # keeps the layout for the next format
    return buffer.getvalue()
