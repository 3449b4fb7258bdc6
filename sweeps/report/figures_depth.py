"""Figures over the prediction depths, the number of them, and the weight of their losses."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from sweeps.report.metrics import LOSS, PER_STEP
from sweeps.report.reading import meaning, predicts_tokens
from sweeps.report.settings import Setting, Settings, show
from sweeps.report.statistics import Interval
from sweeps.report.style import (
    QUIET,
    SEEDS,
    Drawing,
    bars,
    canvas,
    keep_within,
    key_to,
    looks,
)

if TYPE_CHECKING:
    pass


def by_depth(settings: Settings, rate: str) -> Drawing:
    """Loss or agreement of every prediction depth."""
    first = 0 if rate == "loss" else 1
    drawing = Drawing(
        f"{rate}_depth",
        f"{rate.capitalize()} per depth",
        "Validation loss of every depth; depth 0 predicts the next token. "
        + _teacher_forced(settings)
        if rate == "loss"
        else "Lines: teacher-forced agreement of a depth's choice with the main model's choice of "
        "the same token. Crosses: drafts accepted at that position in the real verify loop. "
        + _teacher_forced(settings),
    )
    deepest = max((s.depth or 0 for s in settings.all), default=0)
    tags = {k: f"val/{rate}_depth_{k}" for k in range(first, deepest + 1)}
    main = {k: tag for k, tag in tags.items() if k == 0}
    lines = [_line(s, tags if predicts_tokens(s) else main) for s in settings.all]
    if not any(lines):
        return drawing.lacking(f"no finished run has val/{rate}_depth_{first}")
    shown = [s for s, line in zip(settings.all, lines, strict=True) if line]
    figure, axes = canvas(key_to(settings.all, shown))
    accepted = {k: f"decode/acceptance_position_{k}" for k in tags}
    count = len(settings.all)
    for at, (setting, look) in enumerate(zip(settings.all, looks(settings.all), strict=True)):
        # Side by side, so that equal values do not hide each other.
        aside = 0.3 * ((at + 0.5) / count - 0.5)
        bars(axes, lines[at], look, setting.label, aside)
        if rate == "agreement":
            crosses = _line(setting, accepted)
            means = [found.mean for found in crosses.values()]
            axes.plot([k + aside for k in crosses], means, "x", color=look.colour)
    if rate == "agreement":
        keep_within(axes, 0, 1)
    axes.set_xticks(list(tags))
    axes.set(xlabel="depth", ylabel="nats per token" if rate == "loss" else "share of tokens")
    return drawing.drawn(figure)


def against_depth(settings: Settings, tag: str) -> Drawing:
    """Tokens per step, or the measured speed-up, against D."""
    per_step = tag == PER_STEP
    drawing = Drawing(
        "tokens_per_step" if per_step else "speedup",
        "Tokens per step against D" if per_step else "Speed-up against D",
        (
            "Tokens emitted per verify pass of the greedy decoding loop, the model's own included. "
            "Dotted: D + 1, all drafts accepted. "
            if per_step
            else "Wall clock of plain over that of speculative greedy decoding, one prompt at a "
            "time, on the machine of the run at that moment. Dotted: no gain. "
        )
        + "Without drafts it is 1 by definition (hollow). "
        + SEEDS,
    )
    points = [(s, s.estimate(tag).interval) for s in settings.all if s.depth]
    if not any(found for _, found in points):
        return drawing.lacking(f"no finished run has {tag}")
    families = _families(settings, "mtp.depth")
    standins = [standin for standin, _ in families]
    figure, axes = canvas(key_to(standins, standins))
    deepest = max(s.depth for s, found in points if found and s.depth)
    ideal = [k + 1 for k in range(deepest + 1)] if per_step else [1] * (deepest + 1)
    axes.plot(range(deepest + 1), ideal, ":", color=QUIET, linewidth=1.2)
    for (standin, members), look in zip(families, looks(standins), strict=True):
        line = {s.depth: s.estimate(tag).interval for s in members if s.depth}
        bars(axes, {k: v for k, v in line.items() if v}, look, standin.label, 0)
    if any(setting.depth == 0 for setting in settings.all):
        axes.plot(0, 1, "o", color=QUIET, markerfacecolor="none")
    keep_within(axes, 0, math.inf)
    axes.set_xticks(range(deepest + 1))
    axes.set(xlabel="D", ylabel="tokens per verify pass" if per_step else "times as fast")
    return drawing.drawn(figure)


def against_lambda(settings: Settings, tag: str, what: str) -> Drawing:
    """The effect of lambda on a loss."""
    drawing = Drawing(
        f"lambda_{tag.rpartition('/')[2]}",
        f"Lambda's effect on the {what}",
        "One line for every setting of the other keys. "
        + (SEEDS if tag == LOSS else _teacher_forced(settings)),
    )
    weights = {show(s.config.get("mtp_lambda")): s.config.get("mtp_lambda") for s in settings.all}
    if len(weights) < 2:
        return drawing.lacking("mtp_lambda is not varied")
    families = _families(settings, "mtp_lambda")
    standins = [standin for standin, _ in families]
    figure, axes = canvas(key_to(standins, standins))
    numbers = all(isinstance(value, int | float) for value in weights.values())
    place: dict[str, Any] = {
        text: value if numbers else i for i, (text, value) in enumerate(weights.items())
    }
    drawn = False
    for (standin, members), look in zip(families, looks(standins), strict=True):
        line = {place[show(s.config.get("mtp_lambda"))]: s.estimate(tag).interval for s in members}
        known = {x: found for x, found in sorted(line.items()) if found}
        bars(axes, known, look, standin.label, 0)
        drawn |= bool(known)
    if not drawn:
        return drawing.lacking(f"no finished run has {tag}")
    axes.set_xticks(list(place.values()), list(place))
    axes.set(xlabel="mtp_lambda", ylabel="nats per token")
    return drawing.drawn(figure)


def _teacher_forced(settings: Settings) -> str:
    return f"{SEEDS} {meaning(settings)}".rstrip()


def _line(setting: Setting, tags: dict[int, str]) -> dict[int, Interval]:
    found = {k: setting.estimate(tag).interval for k, tag in tags.items()}
    return {k: value for k, value in found.items() if value}


def _families(settings: Settings, key: str) -> list[tuple[Setting, list[Setting]]]:
    """Settings that differ in one key alone, each family with a stand-in for what it shares."""
    families: dict[str, tuple[Setting, list[Setting]]] = {}
    for setting in settings.all:
        shared = {k: value for k, value in setting.values.items() if k != key}
        standin = Setting(values=shared, config={})
        families.setdefault(standin.label, (standin, []))[1].append(setting)
    return list(families.values())
