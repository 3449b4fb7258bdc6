"""The look of all figures, and the files that they become.

Colors follow the first varied key. Files are readable on paper, on light pages and on dark ones.
The id of a mark names its setting, so that the page's script can hide it.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sweeps.report.names import name_of
from sweeps.report.settings import Setting, show
from sweeps.report.statistics import Interval, Share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Distinguishable with red-green color blindness, on white and on black (after Okabe & Ito 2008).
COLORS = ("#2f7fc1", "#d9761e", "#1f9a73", "#c0559a", "#8a7a1d", "#6b6fd0", "#b5473c", "#3f8f9b")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MANY = 12  # the most settings that a legend lists one by one
_LONGEST = 48  # entries of a legend; more, as for the trials of a search, nobody can read
INK, GRID, PAPER = "#24292f", "#d3d9e0", "#ffffff"
QUIET = "#8b949e"  # lines that belong to no setting

_LETTERS = 58  # of a legend's labels side by side
_POINTS = 72  # SVG points per inch
# Characters that XML forbids; a run's name may have them.
_NO_XML = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f]")
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


@contextmanager
def styled() -> Iterator[None]:
    """A context in which figures are drawn and saved in this look."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


@dataclass(frozen=True)
class Look:
    """Color, line and marker of one setting."""

    color: str
    dash: Any
    marker: str


QUIETLY = Look(QUIET, "-", "o")


def looks(settings: Sequence[Setting]) -> dict[Setting, Look]:
    """Colors follow the first varied key, lines and markers the combination of the others."""
    return dict(zip(settings, looks_of(map(_halves, settings)), strict=True))


def looks_of(halves: Iterable[tuple[str, str]]) -> list[Look]:
    """The look of each (what the color says, what line and marker say)."""
    first: dict[str, int] = {}
    others: dict[str, int] = {}
    styles = []
    for head, rest in halves:
        a = first.setdefault(head, len(first))
        b = others.setdefault(rest, len(others)) + a // len(COLORS)
        # Four dashes and seven markers make 28 different combinations.
        dash, marker = DASHES[b % len(DASHES)], MARKERS[b % len(MARKERS)]
        styles.append(Look(COLORS[a % len(COLORS)], dash, marker))
    return styles


def key_to(settings: Sequence[Setting], shown: Sequence[Setting]) -> list[tuple[str, Look]]:
    """The legend of ``shown``: one entry per setting. If there are many, one per value of the first
    key (its color) and one per combination of the other keys (dash and marker)."""
    look_of = {setting: look for setting, look in looks(settings).items() if setting in shown}
    if len(look_of) <= MANY or len(shown[0].values) < 2:
        return [(setting.name, look) for setting, look in look_of.items()]
    colors = {_halves(s)[0]: Look(look.color, "-", "") for s, look in look_of.items()}
    lines = {_halves(s)[1]: Look(QUIET, look.dash, look.marker) for s, look in look_of.items()}
    return [*colors.items(), *lines.items()]


def _halves(setting: Setting) -> tuple[str, str]:
    parts = [name_of(key, show(value)) for key, value in setting.values.items()]
    return ", ".join(parts[:1]), ", ".join(parts[1:])


def brief(label: str, letters: int = 46) -> str:
    """A label in one line, shortened in the middle to fit into a figure."""
    label, half = " ".join(label.split()), letters // 2
    return label if len(label) <= letters else f"{label[:half]}…{label[-half:]}"


class Chart:
    """A figure with one pair of axes, whose marks know their setting.

    Args:
        key: the legend below the figure, in one or two columns; not shown if it has one entry, or
            too many.
        names: names of all settings; the page hides their marks and shows their values.
        rows: lines of text that need extra height, besides those of the legend.
        panels: pairs of axes, up to three side by side, more in two columns; the first is
            :attr:`axes`.
    """

    def __init__(
        self,
        key: Iterable[tuple[str, Look]] = (),
        *,
        names: Sequence[str] = (),
        rows: int = 0,
        panels: int = 1,
    ) -> None:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        self._names = list(names)
        self._parts = itertools.count()  # makes ids unique
        self._points: list[tuple[str, tuple[float, float], tuple[str, str]]] = []
        entries = list(key)
        entries = entries if 1 < len(entries) <= _LONGEST else []
        longest = max((len(brief(name)) for name, _ in entries), default=0)
        wide = panels if panels <= 3 else 2
        high = math.ceil(panels / wide)
        columns = max(1, min(2 * wide, _LETTERS * wide // (longest + 1)))
        rows += math.ceil(len(entries) / columns)
        size = (5.2, 3.3 + 0.2 * rows) if panels == 1 else (4.6 * wide, 3.9 * high + 0.2 * rows)
        self.figure: Figure = Figure(figsize=size, layout="constrained", facecolor=PAPER)
        grid = self.figure.subplots(high, wide, squeeze=False).ravel()
        for spare in grid[panels:]:
            spare.remove()
        self.panels = grid[:panels]
        self.axes = self.panels[0]
        for axes in self.panels:
            axes.set_facecolor("none")
        if entries:
            handles = [
                Line2D([], [], color=o.color, linestyle=o.dash, marker=o.marker, label=brief(name))
                for name, o in entries
            ]
            legend = self.figure.legend(handles=handles, loc="outside lower center", ncols=columns)
            legend_rows = zip(entries, legend.get_texts(), legend.get_lines(), strict=True)
            for (name, _), text, handle in legend_rows:
                self._mark("switch", name, [text, handle])

    def _mark(self, kind: str, name: str, artists: Iterable[Any]) -> None:
        if name in self._names:
            for artist in artists:
                artist.set_gid(f"{kind}-{self._names.index(name)}-{next(self._parts)}")

    def draw(
        self,
        name: str,
        look: Look,
        xs: Sequence[float | Interval],
        ys: Sequence[float | Interval],
        *,
        tooltips: bool = True,
        filled: bool = True,
        **style: Any,
    ) -> None:
        """Draw points of the setting of that name, joined by a line if ``style`` has a linestyle.

        Args:
            xs: the points' x, either all numbers or all means with their intervals.
            ys: the same of y.
            tooltips: whether the points show their values under the pointer.
            filled: False for hollow markers.
            style: options of matplotlib's ``errorbar``.
        """
        defaults = {"color": look.color, "marker": look.marker, "linestyle": "none"}
        defaults |= {} if filled else {"markerfacecolor": "none"}
        x_means, y_means = _means(xs), _means(ys)
        container = self.axes.errorbar(
            x_means, y_means, xerr=_reach(xs), yerr=_reach(ys), label=name, **{**defaults, **style}
        )
        container.lines[0].set_label(name if tooltips else f"_{name}")
        self._mark("series", name, container.get_children())
        if tooltips and name in self._names:
            points = zip(x_means, y_means, strict=True)
            for point, x, y in zip(points, xs, ys, strict=True):
                self._points.append((name, point, (_interval_text(x), _interval_text(y))))

    def points(self) -> Iterator[tuple[int, float, float, str]]:
        """(Number of the setting, x, y in the SVG, tooltip) of the visible points of a figure that
        was saved before, and so is laid out."""
        scale, height = _POINTS / self.figure.dpi, self.figure.get_figheight() * _POINTS
        # An axis label without its part in parentheses, such as "(lower is better)".
        texts = (self.axes.get_xlabel(), self.axes.get_ylabel())
        labels = [re.split(r"\s\(", text)[0] for text in texts]
        for name, point, reach in self._points:
            right, up = self.axes.transData.transform(point)
            if self.axes.bbox.contains(right, up):
                values = zip(labels, point, reach, strict=True)
                lines = [f"{label}: {_digits(x)}{bar}" for label, x, bar in values if label]
                place = round(right * scale, 1), round(height - up * scale, 1)
                yield self._names.index(name), *place, "\n".join([name, *lines])

    def percent(self, which: str, *, whole: bool = True) -> None:
        """Write the ``x`` or ``y`` axis in percent, from 0 % to 100 % or as far as needed."""
        from matplotlib.ticker import PercentFormatter

        axis = self.axes.xaxis if which == "x" else self.axes.yaxis
        axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        if whole:
            self.axes.set(**{f"{which}lim": (-0.03, 1.03)})
        elif which == "y":
            self.keep_within(1)

    def keep_within(self, high: float) -> None:
        """Cut the y axis at 0 and at ``high``; an interval may reach beyond the possible values."""
        bottom, top = self.axes.get_ylim()
        margin = 0.03 * (min(top, high) - max(bottom, 0))
        self.axes.set_ylim(max(bottom, -margin), min(top, high + margin))

    def si_axis(self) -> None:
        """Give the x axis few ticks, written as 15 M."""
        from matplotlib.ticker import EngFormatter, MaxNLocator

        for axes in self.panels:
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axes.xaxis.set_major_locator(MaxNLocator(5))

    def doubling_axis(self, places: Sequence[float]) -> None:
        """Give the x axis a base-2 logarithmic scale with ticks at the places."""
        self.axes.set_xscale("log", base=2)
        self.axes.set_xticks(places, [f"{place:g}" for place in places])
        self.axes.minorticks_off()

    def png(self) -> bytes:
        """The figure as a PNG on white, for slides and TensorBoard."""
        return self._save(format="png", dpi=160)

    def svg(self, *, source: str | None = None) -> bytes:
        """The figure as an SVG file on white; ``source`` goes into its metadata."""
        svg = self._save(format="svg", metadata={"Date": None, "Identifier": source})
        return _NO_XML.sub("\N{REPLACEMENT CHARACTER}".encode(), svg)

    def _save(self, **options: Any) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, **options)
        self.figure.set_layout_engine("none")  # keeps the layout for the next format
        return buffer.getvalue()


def by_row(labels: Sequence[str], *, names: Sequence[str] = ()) -> Chart:
    """An empty chart with one row per label; the first is at the bottom, at y = 0."""
    if len(labels) <= MANY:
        # Spaces that do not break keep "D = 2" in one line.
        labels = [brief(label, 90).replace(" = ", "\u00a0=\u00a0") for label in labels]
        labels = [textwrap.fill(label, 24) for label in labels]
    labels = [label if "\n" in label else brief(label, 36) for label in labels]
    lines = sum(label.count("\n") + 1 for label in labels)
    chart = Chart(names=names, rows=max(lines - 14, 0))
    chart.axes.set_yticks(range(len(labels)), labels)
    chart.axes.set_ylim(-0.6, len(labels) - 0.4)
    return chart


def shares_by_row(rows: Sequence[tuple[str, Look, Share]], *, names: Sequence[str] = ()) -> Chart:
    """Shares of seeds with their intervals, one per row; the first is at the top."""
    bottom_up = rows[::-1]
    chart = by_row([label for label, _, _ in bottom_up], names=names)
    for y, (label, look, share) in enumerate(bottom_up):
        chart.draw(label, look, [share.interval], [y])
    chart.percent("x")
    return chart


def _means(values: Sequence[float | Interval]) -> list[float]:
    return [value.mean if isinstance(value, Interval) else value for value in values]


def _reach(values: Sequence[float | Interval]) -> list[tuple[float, ...]] | None:
    """Distances to the lower and to the upper ends of intervals, as matplotlib takes them."""
    reach = [value.reach for value in values if isinstance(value, Interval)]
    return [*zip(*reach, strict=True)] or None


def _interval_text(value: float | Interval) -> str:
    """An interval: `` ± HALF``, or `` (LOW to HIGH)``; empty for a number alone."""
    if not isinstance(value, Interval) or not any(value.reach):
        return ""
    (down, up), (low, high) = value.reach, value.span
    half = (down + up) / 2
    even = abs(up - down) <= 2e-6 * half
    return f" ± {_digits(half)}" if even else f" ({_digits(low)} to {_digits(high)})"


def _digits(value: float) -> str:
    """Five digits, with commas between thousands."""
    value = float(f"{value:.5g}")
    return f"{value:,.0f}" if value.is_integer() else f"{value:,.5g}"
