"""A run's curves."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Distinguishable with red-green color blindness (after Okabe & Ito 2008); depth k has color k.
_COLORS = ("#2f7fc1", "#d9761e", "#1f9a73", "#c0559a", "#8a7a1d", "#6b6fd0")


def draw(metrics: DataFrame, tags: Sequence[str]) -> Figure:
    """The curves of some tags, each under its own name."""
    figure, (axes,) = _figure(1)
    for number, tag in enumerate(tags):
        _curve(axes, metrics, tag, number, label=tag)
    _finish(axes)
    return figure


def draw_overview(metrics: DataFrame) -> Figure:
    """The loss of every depth in training and validation; next to it the acceptance of drafts, or
    the share of right answers of a task, if either was logged."""
    is_task = "val/exact_match" in metrics
    drafts = _numbered(metrics, "decode/acceptance_position_")
    shares = {0: "val/exact_match"} if is_task else drafts
    figure, axes = _figure(2 if shares else 1)
    for depth, tag in _numbered(metrics, "val/loss_depth_").items():
        trained = tag.replace("val/", "train/")
        if trained in metrics:
            _curve(axes[0], metrics, trained, depth, alpha=0.35, linewidth=0.8)
        name = "next token" if depth == 0 else f"depth {depth}"
        _curve(axes[0], metrics, tag, depth, label=name, marker="o")
    axes[0].set_ylabel("loss, nats per token (thin: in training)")
    _finish(axes[0])
    if shares:
        for number, tag in shares.items():
            name = "right answers" if is_task else f"draft {number}"
            _curve(axes[1], metrics, tag, number, label=name, marker="o")
        axes[1].set_ylim(0, 1)
        axes[1].set_ylabel("share" if is_task else "share of drafts accepted")
        _finish(axes[1])
    return figure


def _numbered(metrics: DataFrame, prefix: str) -> dict[int, str]:
    """The tags that are a prefix and a number, by that number."""
    return {int(tag[len(prefix) :]): tag for tag in metrics if re.fullmatch(rf"{prefix}\d+", tag)}


def _figure(n: int) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that a notebook shows, whatever its backend."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=110)
            return buffer.getvalue()

    figure = Picture(figsize=(5.2 * n, 3.6), layout="constrained")
    return figure, [figure.add_subplot(1, n, i + 1) for i in range(n)]


def _curve(axes: Axes, metrics: DataFrame, tag: str, number: int, **style: Any) -> None:
    values = metrics[tag].dropna()
    axes.plot(values.index, values, color=_COLORS[number % len(_COLORS)], **style)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("optimizer steps")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
