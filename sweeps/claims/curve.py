"""How the main prediction's training loss falls with compute: of claims whose arms have the same
FLOPs, one panel a tokenizer, one line an arm with its interval over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sweeps.report.read import Run
from sweeps.report.statistics import interval
from sweeps.report.style import COLOURS, DASHES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TAG = "train/loss_depth_0"
# Parts of a run that are a point each: the mean of the steps that were logged in it.
PARTS = 20
# Of the compute; the fall before it would hide the differences behind it.
_SHOWN_FROM = 0.2

Result = dict[str, Any]


def curve_of(run: Run) -> list[tuple[float, float]]:
    """FLOPs up to the middle of each part of a finished run, and the mean loss of the part, nats a
    token; empty where a part has no value."""
    steps, flops = run.final("step"), run.final("flops")
    if not steps or not flops:
        return []
    parts: list[list[float]] = [[] for _ in range(PARTS)]
    for row in run.rows:
        if TAG in row:
            parts[min(int((row["step"] - 1) / steps * PARTS), PARTS - 1)].append(row[TAG])
    if not all(parts):
        return []
    return [
        ((i + 0.5) / PARTS * flops, math.fsum(part) / len(part)) for i, part in enumerate(parts)
    ]


def panels(result: Result) -> dict[str, list[str]]:
    """The arms that have curves, by tokenizer: nats a token compare within one alone."""
    found: dict[str, list[str]] = {}
    for arm, content in result["arms"].items():
        if _curves(content):
            named = [o for o in content["overrides"] if o.startswith("tokenizer=")]
            found.setdefault(named[-1] if named else "the experiment's tokenizer", []).append(arm)
    return found


def draw(result: Result) -> Figure:
    """The figure; there is a panel."""
    from matplotlib.figure import Figure

    found = panels(result)
    figure = Figure(figsize=(4.6 * len(found) + 0.4, 4.4), layout="constrained")
    for axes, (title, arms) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        _panel(axes, [(arm, _curves(result["arms"][arm])) for arm in arms])
        axes.set_title(title, fontsize=10.5)
        axes.set_xlabel("training FLOPs")
    figure.axes[0].set_ylabel("training loss of the next token (nats a token)")
    return figure


def _panel(axes: Axes, arms: Sequence[tuple[str, list[list[list[float]]]]]) -> None:
    heads: dict[str, int] = {}
    seen: dict[str, int] = {}
    highest, lowest = 0.0, math.inf
    for arm, curves in arms:
        head = arm.rpartition("_")[0] if arm[-1].isdigit() else arm
        colour = COLOURS[heads.setdefault(head, len(heads)) % len(COLOURS)]
        dash = DASHES[seen.setdefault(head, 0) % len(DASHES)]
        seen[head] += 1
        at = [math.fsum(curve[i][0] for curve in curves) / len(curves) for i in range(PARTS)]
        means = [interval([curve[i][1] for curve in curves]) for i in range(PARTS)]
        middle, half = [m.mean for m in means], [m.half or 0.0 for m in means]
        axes.plot(at, middle, color=colour, linestyle=dash, label=arm)
        low = [m - h for m, h in zip(middle, half, strict=True)]
        high = [m + h for m, h in zip(middle, half, strict=True)]
        axes.fill_between(at, low, high, color=colour, alpha=0.18, linewidth=0)
        shown = [m for x, m in zip(at, middle, strict=True) if x >= _SHOWN_FROM * at[-1]]
        highest, lowest = max(highest, *shown), min(lowest, *low)
    axes.set_ylim(lowest, highest)
    axes.set_xlim(0)
    axes.legend()


def _curves(content: dict[str, Any]) -> list[Any]:
    """Of the seeds that have one."""
    return [seed["curve"] for seed in content["seeds"].values() if seed.get("curve")]
