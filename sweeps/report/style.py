"""How figures look: one canvas, colours by the first varied key, and files that read on paper, on a
light page and on a dark one."""

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

# Told apart by people who confuse red and green, on white and on black (after Okabe & Ito 2008).
COLOURS = ("#2f7fc1", "#d9761e", "#1f9a73", "#c0559a", "#8a7a1d", "#6b6fd0", "#b5473c", "#3f8f9b")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 12  # settings that a legend still lists one by one
_WIDE = 29  # letters of a legend's label that leave no room for a second column
INK, GRID, PAPER = "#24292f", "#d3d9e0", "#ffffff"
QUIET = "#8b949e"  # lines that are no setting's

_NO_XML = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")  # may stand in a run's name

WHOLE = (-0.03, 1.03)  # limits of an axis for shares
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
    # A dollar in a setting's name is a dollar.
    "text.parse_math": False,
    # Text stays text: it can be searched, and takes the page's font.
    "svg.fonttype": "none",
    "svg.hashsalt": "mtp-lightning",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the report.

    Attributes:
        name: of its files.
        title: above it.
        caption: what it says, and how it was computed.
        figure: None where there is nothing to draw.
        why: what is missing then.
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
    """Colour, line and marker of one setting."""

    colour: str
    dash: Any
    marker: str


@contextmanager
def styled() -> Iterator[None]:
    """Figures made, and saved, inside have the report's look."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def looks(settings: list[Setting]) -> list[Look]:
    """Colours follow the first varied key, lines and markers the others together."""
    first: dict[str, int] = {}
    others: dict[str, int] = {}
    found = []
    for setting in settings:
        head, rest = _halves(setting)
        a = first.setdefault(head, len(first))
        b = others.setdefault(rest, len(others)) + a // len(COLOURS)
        # Four dashes and seven markers come together again after 28 settings.
        dash, marker = DASHES[b % len(DASHES)], MARKERS[b % len(MARKERS)]
        found.append(Look(COLOURS[a % len(COLOURS)], dash, marker))
    return found


def looks_of(settings: list[Setting]) -> dict[int, Look]:
    """:func:`looks` by the settings' ``id``."""
    return {id(s): look for s, look in zip(settings, looks(settings), strict=True)}


def key_to(settings: list[Setting], shown: list[Setting]) -> list[tuple[str, Look]]:
    """The legend of ``shown``: a line for each setting, or, if they are many, one for each value
    of the first key (its colour) and one for each combination of the others (dash and marker)."""
    pairs = [
        (setting, look)
        for setting, look in zip(settings, looks(settings), strict=True)
        if any(setting is one for one in shown)
    ]
    if len(pairs) <= MANY or len(shown[0].values) < 2:
        return [(setting.name, look) for setting, look in pairs]
    colours = {_halves(s)[0]: Look(look.colour, "-", "") for s, look in pairs}
    lines = {_halves(s)[1]: Look(QUIET, look.dash, look.marker) for s, look in pairs}
    return [*colours.items(), *lines.items()]


def _halves(setting: Setting) -> tuple[str, str]:
    parts = [name_of(key, show(value)) for key, value in setting.values.items()]
    return ", ".join(parts[:1]), ", ".join(parts[1:])


def canvas(key: list[tuple[str, Look]] | None = None, *, rows: int = 0) -> tuple[Figure, Axes]:
    """An empty figure.

    Args:
        key: its legend, below it in one or two columns; None or a single entry for none.
        rows: lines of text that it needs more room for, beside those of the legend.
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
                Line2D([], [], color=o.colour, linestyle=o.dash, marker=o.marker, label=label)
                for label, o in entries
            ],
            loc="outside lower center",
            ncols=columns,
        )
    return figure, axes


def by_row(labels: list[str]) -> tuple[Figure, Axes]:
    """An empty figure with a row for each label, the first one at the bottom, at y = 0."""
    labels = [brief(label, 36) for label in labels]
    if len(labels) <= MANY:
        labels = [textwrap.fill(label, 24) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels)
    figure, axes = canvas(rows=max(lines - 14, 0))
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    return figure, axes


def brief(label: str, letters: int = 46) -> str:
    """A label that fits into a figure: one line, its beginning and its end."""
    label, half = " ".join(label.split()), letters // 2
    return label if len(label) <= letters else f"{label[:half]}…{label[-half:]}"


def bars(axes: Axes, line: Mapping[Any, Interval], look: Look, label: str, aside: float) -> None:
    """One setting's means, with their intervals, over places on the x axis."""
    if not line:
        return
    axes.errorbar(
        [x + aside for x in line],
        [found.mean for found in line.values()],
        yerr=[*zip(*(found.reach for found in line.values()), strict=True)],
        fmt=look.marker,
        linestyle=look.dash,
        color=look.colour,
        elinewidth=1,
        label=label,
    )


def si_axis(axes: Axes) -> None:
    """Few ticks on the x axis, as 15 M."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(5))


def share_axis(axes: Axes, which: str) -> None:
    """The ``x`` or ``y`` axis of a share: 0 % to 100 %, beyond which no interval reaches."""
    _percent(axes, which)
    axes.set(**{f"{which}lim": WHOLE})


def keep_to_shares(axes: Axes) -> None:
    """The same of a ``y`` axis, as much of it as the values need."""
    _percent(axes, "y")
    keep_within(axes, 0, 1)


def _percent(axes: Axes, which: str) -> None:
    from matplotlib.ticker import PercentFormatter

    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def doubling_axis(axes: Axes, places: Sequence[float]) -> None:
    """An x axis on which what doubles is equally far apart, with ticks at the places."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place:g}" for place in places])
    axes.minorticks_off()


def keep_within(axes: Axes, low: float, high: float) -> None:
    """An interval may reach beyond what a rate can be; the axis does not."""
    bottom, top = axes.get_ylim()
    room = 0.03 * (min(top, high) - max(bottom, low))
    axes.set_ylim(max(bottom, low - room), min(top, high + room))


def as_png(figure: Figure) -> bytes:
    """For slides and TensorBoard, on white."""
    return _save(figure, format="png", dpi=160)


def as_svg(figure: Figure, *, of: str | None = None) -> bytes:
    """A file of its own, on white; ``of`` says in its metadata what it was drawn from."""
    svg = _save(figure, format="svg", metadata={"Date": None, "Identifier": of})
    return _NO_XML.sub("\N{REPLACEMENT CHARACTER}".encode(), svg)


def as_inline(svg: bytes, *, name: str, label: str, points: Iterable[Point] = ()) -> str:
    """The SVG as part of a page: its ink is the page's, its ids are its own. What it has as styles
    becomes attributes, since the page's policy allows no style that it does not name. Every point
    gets a circle over it that says its values."""
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
    """Without its namespace, as HTML has it."""
    return name.rpartition("}")[2]


def _attributes(style: str) -> dict[str, str]:
    """A style's declarations as attributes of presentation; the font's name is the page's."""
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
    figure.set_layout_engine("none")  # it is laid out, and stays so in the next format
    return buffer.getvalue()
