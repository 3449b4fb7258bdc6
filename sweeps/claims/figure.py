"""Draws a claim's figures: per measure, the effects with intervals and thresholds, or the share of
seeds that solve; and training loss against compute for arms of the same FLOPs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning.errors import UserError
from mtp_lightning.run.atomic import write_bytes
from sweeps.claims.decide import UNDECIDED
from sweeps.claims.observe import PARTS
from sweeps.claims.result import Result
from sweeps.claims.words import quantity, subject
from sweeps.report.statistics import interval, share
from sweeps.report.style import COLORS, DASHES, QUIET, as_svg, by_row, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The suffix of the file with the curves.
CURVE = "_curve"
# The share of the compute that the y-axis leaves out: the early fall would hide the differences.
_SHOWN_FROM = 0.2


def write_figures(result: Result, label: str, folder: Path) -> list[Path]:
    """Write ``LABEL.svg``, ``LABEL_2.svg`` .. for further measures with numbers, and
    ``LABEL_curve.svg`` where arms have the same FLOPs.

    Args:
        result: a claim's result.
        label: the claim's label.
        folder: an existing folder.

    Raises:
        UserError: matplotlib is missing.
    """
    files = []
    with _styled():
        drawn = [partial(_draw, result, entries) for entries in _drawn(result)]
        if panels(result):
            drawn.append(partial(draw_curves, result))
        for file, draw in zip(files_of(result, label, folder), drawn, strict=True):
            write_bytes(as_svg(draw(), of=digest(result)), file)
            files.append(file)
    return files


def files_of(result: Result, label: str, folder: Path) -> list[Path]:
    """The paths of a result's figures; the curves come last."""
    n = len(_drawn(result))
    files = [folder / f"{label}{f'_{i}' if i > 1 else ''}.svg" for i in range(1, n + 1)]
    return [*files, folder / f"{label}{CURVE}.svg"] if panels(result) else files


def digest(result: Result) -> str:
    """SHA-256 of a result, stored in the metadata of its figures."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _styled() -> Any:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UserError("The figures need matplotlib: pip install -e '.[report]'.") from None
    return styled()


def _drawn(result: Result) -> list[list[dict[str, Any]]]:
    """The predictions with numbers, grouped by measure."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in result["predictions"]:
        if entry["effect"] is not None:
            groups.setdefault(quantity(entry["measure"]), []).append(entry)
    return list(groups.values())


def _draw(result: Result, entries: Sequence[dict[str, Any]]) -> Figure:
    measure = entries[0]["measure"]
    return _effects(entries) if measure["solved"] is None else _shares(result, measure)


def _effects(entries: Sequence[dict[str, Any]]) -> Figure:
    """A filled point is a decided prediction, a tick is its threshold."""
    shown = list(reversed(entries))
    figure, axes = by_row([subject(entry) for entry in shown])
    ratio = bool(shown[0]["measure"].get("curve"))
    axes.axvline(1 if ratio else 0, color=QUIET, linewidth=1)
    for y, entry in enumerate(shown):
        ends = (entry["low"], entry["high"])
        reach = None if None in ends else [[entry["effect"] - ends[0]], [ends[1] - entry["effect"]]]
        axes.errorbar(
            entry["effect"],
            y,
            xerr=reach,
            fmt="o",
            color=COLORS[0],
            markerfacecolor="none" if entry["verdict"] == UNDECIDED else COLORS[0],
        )
        bounds = [entry["by"], -entry["by"]] if entry["side"] == "within" else [entry["by"]]
        axes.plot(bounds, [y] * len(bounds), "|", color=COLORS[1], markersize=14)
    axes.set_xlabel(quantity(entries[0]["measure"]))
    return figure


def _shares(result: Result, measure: dict[str, Any]) -> Figure:
    """Every arm's share of seeds that solve, with its interval."""
    counts = {arm: _count(content, measure) for arm, content in result["arms"].items()}
    shown = [(arm, share(*count)) for arm, count in reversed(counts.items()) if count[1]]
    figure, axes = by_row([arm for arm, _ in shown])
    for y, (_, found) in enumerate(shown):
        reach = [[found.rate - found.low], [found.high - found.rate]]
        axes.errorbar(found.rate, y, xerr=reach, fmt="o", color=COLORS[0])
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel(quantity(measure))
    return figure


def _count(content: dict[str, Any], measure: dict[str, Any]) -> tuple[int, int]:
    values = [
        seed["values"][measure["tag"]]
        for seed in content["seeds"].values()
        if seed["state"] == "done" and measure["tag"] in seed["values"]
    ]
    return sum(value > measure["solved"] for value in values), len(values)


def panels(result: Result) -> dict[str, list[str]]:
    """The arms with curves, by tokenizer: nats per token of different tokenizers do not compare."""
    found: dict[str, list[str]] = {}
    for arm, content in result["arms"].items():
        if _curves(content):
            named = [o for o in content["overrides"] if o.startswith("tokenizer=")]
            found.setdefault(named[-1] if named else "the experiment's tokenizer", []).append(arm)
    return found


def draw_curves(result: Result) -> Figure:
    """The main prediction's training loss against compute: one panel per tokenizer, one line per
    arm, with its interval over seeds. The result has at least one curve."""
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
        color = COLORS[heads.setdefault(head, len(heads)) % len(COLORS)]
        dash = DASHES[seen.setdefault(head, 0) % len(DASHES)]
        seen[head] += 1
        at = [math.fsum(curve[i][0] for curve in curves) / len(curves) for i in range(PARTS)]
        means = [interval([curve[i][1] for curve in curves]) for i in range(PARTS)]
        middle, half = [m.mean for m in means], [m.half or 0.0 for m in means]
        axes.plot(at, middle, color=color, linestyle=dash, label=arm)
        low = [m - h for m, h in zip(middle, half, strict=True)]
        high = [m + h for m, h in zip(middle, half, strict=True)]
        axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
        shown = [m for x, m in zip(at, middle, strict=True) if x >= _SHOWN_FROM * at[-1]]
        highest, lowest = max(highest, *shown), min(lowest, *low)
    axes.set_ylim(lowest, highest)
    axes.set_xlim(0)
    axes.legend()


def _curves(content: dict[str, Any]) -> list[Any]:
    """The curves of an arm's seeds."""
    return [seed["curve"] for seed in content["seeds"].values() if seed.get("curve")]
