"""A figure of a report: its words, its chart, and its place in the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sweeps.report.chart import GRID, INK, PAPER, Chart
from sweeps.report.comparable import note_on_depths, text_errors
from sweeps.report.metrics import BITS
from sweeps.report.names import sentence, texts
from sweeps.report.settings import Setting, Settings


@dataclass(frozen=True)
class Drawing:
    name: str  # the name of its files
    title: str  # the title above it
    caption: str  # an explanation of what is shown and how it was computed
    x: str = ""  # the names of its axes; empty where the chart has its own
    y: str = ""
    chart: Chart | None = None  # the figure; None if data is missing
    why: str = ""  # what is missing

    def drawn(self, chart: Chart) -> Drawing:
        """The figure with its chart, whose axes it names."""
        if self.x:
            chart.axes.set_xlabel(_in_lines(self.x))
        if self.y:
            chart.axes.set_ylabel(_in_lines(self.y))
        return replace(self, chart=chart)

    def lacking(self, why: str) -> Drawing:
        return replace(self, chart=None, why=why)


def drawing_of(settings: Settings, kind: str, *, name: str = "", **values: Any) -> Drawing:
    """A figure without its chart.

    Args:
        kind: the name of its words in ``texts.yaml``.
        name: the name of its files, if it is another one.
        values: what stands for the names in braces, besides those of every figure.
    """
    words = texts("figures")[kind]
    defaults = {
        "level": f"{settings.level:g}",
        "unit": settings.headline.unit,
        "seeds": sentence("seeds"),
        "meaning": note_on_depths(settings),
        "text_error": text_error(settings, settings.all),
    }
    title, caption, x, y = (
        words.get(key, "").format(**{**defaults, **values}).strip()
        for key in ("title", "caption", "x", "y")
    )
    return Drawing(name or kind, title, caption, x, y)


def _in_lines(label: str) -> str:
    """An axis label; the part in parentheses of a long one has its own line, because an axis may be
    shorter than its label, and the font of the page wider than matplotlib's."""
    return label.replace(" (", "\n(") if len(label) > 30 else label


def text_error(settings: Settings, members: Sequence[Setting]) -> str:
    """The text's own error, which intervals over seeds leave out; empty for losses per token."""
    return text_errors(members) if settings.headline.tag == BITS else ""


def as_inline(svg: bytes, drawing: Drawing) -> str:
    """The SVG of a drawing as an element of a page. It takes the page's text color, and its ids get
    its name as a prefix. Inline styles become attributes, because the page's content security
    policy forbids them. Every point gets a circle with its values as a tooltip."""
    root = ElementTree.fromstring(svg)
    for parent in [*root.iter()]:
        for child in [*parent]:
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        attributes |= _attributes(attributes.pop("style", ""))
        for key, value in attributes.items():
            if key in ("id", "href"):
                attributes[key] = re.sub("^#?", rf"\g<0>{drawing.name}-", value)
            elif value.startswith("url(#"):
                attributes[key] = value.replace("#", f"#{drawing.name}-", 1)
        element.attrib = attributes
    for number, x, y, tooltip in drawing.chart.points() if drawing.chart else ():
        attributes = {"cx": f"{x}", "cy": f"{y}", "r": "6", "class": f"point series-{number}"}
        circle = ElementTree.SubElement(root, "circle", attributes)
        ElementTree.SubElement(circle, "title").text = tooltip
    view = {"viewBox": root.attrib["viewBox"]}
    root.attrib = {"role": "img", "aria-label": drawing.title, "class": "figure", **view}
    return ElementTree.tostring(root, encoding="unicode")


def _local(name: str) -> str:
    """A name without its XML namespace, as in HTML."""
    return name.rpartition("}")[2]


def _attributes(style: str) -> Mapping[str, str]:
    """A style's declarations as presentation attributes, without the font's name."""
    attributes = {}
    for declaration in filter(None, style.split(";")):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font" and (size := re.search(r"[\d.]+px", value)):
            key, value = "font-size", size[0]
        if key != "font-family":
            attributes[key] = {INK: "currentColor", GRID: "var(--grid)"}.get(value, value)
    return {**attributes, "fill": "none"} if attributes.get("fill") == PAPER else attributes
