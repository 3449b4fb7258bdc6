"""The numbers of ``LongRange`` and of acceptance by position as charts, for loggers that draw."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Name -> the tags, with their x value and a depth as groups, and the names of the axes.
_KINDS = {
    "loss_position": (
        r"val/loss_position_(\d+)(?:-\d+)?(?:_depth_(\d+))?",
        "tokens read (a bucket's first)",
        "nats per token",
    ),
    "context_gain": (
        r"val/context_gain_(\d+)",
        "last tokens read",
        "nats more than with the window",
    ),
    "random_repeat": (r"val/accuracy_random_repeat_(\d+)", "period, tokens", "share of tokens"),
    "acceptance": (
        r"decode/acceptance_at_(\d+)-\d+",
        "tokens read (a bucket's first)",
        "share of drafts",
    ),
}


@dataclass(frozen=True)
class Curves:
    """Lines in one chart with a logarithmic x axis.

    Attributes:
        name: name of the chart.
        x_label, y_label: names of its axes.
        lines: points (x, y) in order, by the line's label.
    """

    name: str
    x_label: str
    y_label: str
    lines: dict[str, list[tuple[float, float]]]


def curves(values: Mapping[str, float]) -> list[Curves]:
    """All charts with values, by log tag."""
    found = []
    for name, (pattern, x_label, y_label) in _KINDS.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for tag, value in values.items():
            if match := re.fullmatch(pattern, tag):
                depth = match[2] if match.re.groups > 1 and match[2] else "0"
                lines.setdefault(f"depth {depth}", []).append((float(match[1]), value))
        if lines:
            ordered = {label: sorted(points) for label, points in sorted(lines.items())}
            found.append(Curves(name, x_label, y_label, ordered))
    return found
