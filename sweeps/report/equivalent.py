"""Compute-equivalent gain: the compute that plain training needs for the same loss.

Plain next-token training reaches a loss L with ``C_plain(L)`` FLOPs. A run that ends at L with C
FLOPs has

    gain = C_plain(L) / C = price x effect

A run with a gain of 1 pays for itself. The *price* is (FLOPs of a plain step) / (FLOPs of the run's
step), which depends only on the two models. The *effect* is the number of plain steps that a step
of the run is worth.

Each point of the plain curve is a complete run with the same seed and, if the learning rate decays,
the same share of decay, because a run that was stopped early has not annealed. Between the points,
log C is interpolated over L by a monotone cubic (Fritsch & Carlson 1980, SIAM J. Numer. Anal. 17).
Nothing is extrapolated: a loss beyond the points has no gain.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mtp_lightning.run.config import lies_in
from sweeps import grouped
from sweeps.report.comparable import by_text
from sweeps.report.metrics import FLOPS
from sweeps.report.settings import FOLLOWING, OF_DEPTHS, Setting, Settings, show
from sweeps.report.statistics import Interval, ratio_interval

# Keys of the budget: an arm and its curve agree in all others but these and those of the depths.
_BUDGET = (
    "trainer.max_steps",
    "trainer.val_check_interval",
    "optimizer.schedule.warmup_steps",
    "optimizer.schedule.warmup_fraction",
    "compare",
    "callbacks",
)


@dataclass(frozen=True, order=True)
class Spent:
    """The compute and the final loss of a run."""

    flops: float  # training FLOPs of the whole run
    loss: float  # final loss; lower is better
    steps: float  # optimizer steps


@dataclass(frozen=True)
class Gain:
    total: float  # `C_plain(L) / C`
    price: float  # FLOPs of a plain step divided by those of the run's step

    @property
    def effect(self) -> float:
        """The number of plain steps that a step is worth."""
        return self.total / self.price


class PlainCurve:
    """``C_plain(L)`` through plain runs of at least two lengths.

    Raises:
        ValueError: there are too few runs, or more compute did not always lower the loss.
    """

    def __init__(self, runs: Sequence[Spent]) -> None:
        from scipy.interpolate import PchipInterpolator

        best: dict[float, Spent] = {}
        for run in sorted(runs):  # the lower loss of two runs of equal FLOPs
            best.setdefault(run.flops, run)
        self.runs = list(best.values())
        losses = [run.loss for run in self.runs]
        if len(self.runs) < 2:
            raise ValueError("a plain curve needs runs of at least two lengths")
        if any(after >= before for before, after in zip(losses, losses[1:], strict=False)):
            raise ValueError("more compute did not always make the plain runs' loss lower")
        self._log_flops: Any = PchipInterpolator(
            losses[::-1], [math.log(run.flops) for run in self.runs[::-1]], extrapolate=False
        )

    def flops_at(self, loss: float) -> float | None:
        """FLOPs that plain training needs for a loss; None beyond the curve."""
        if not self.runs[-1].loss <= loss <= self.runs[0].loss:
            return None
        return math.exp(float(self._log_flops(loss)))

    def gain(self, run: Spent) -> Gain | str:
        """The gain of a run, or the reason if its loss is beyond the curve."""
        flops = self.flops_at(run.loss)
        if flops is None:
            return (
                f"out of range: its loss of {run.loss:.4f} is not between those of the plain runs, "
                f"{self.runs[-1].loss:.4f} to {self.runs[0].loss:.4f}"
            )
        # A plain step costs the same at every length.
        plain = self.runs[-1].flops / self.runs[-1].steps
        return Gain(total=flops / run.flops, price=plain / (run.flops / run.steps))


def gain_over(plain: Sequence[Spent], run: Spent) -> Gain | str:
    """The gain of a run over plain runs, or the reason why it has none."""
    try:
        curve = PlainCurve(plain)
    except ValueError as error:
        return str(error)
    return curve.gain(run)


@dataclass(frozen=True)
class Valued:
    """An arm compared with the plain curves of its seeds."""

    setting: Setting  # the arm
    n: int  # number of its seeds that have a gain
    why: str  # why there is no mean: a seed has no gain
    # Geometric means over seeds, with the t interval of the logarithms; None without a mean.
    total: Interval | None
    price: Interval | None
    effect: Interval | None


@dataclass(frozen=True)
class Family:
    """Plain settings that differ only in budget, and arms that may also differ in modules."""

    plain: list[Setting]  # the curve's settings, ordered by FLOPs
    arms: list[Valued]  # the arms with their gains


def families(settings: Settings) -> list[Family]:
    """The plain curves of a report with their arms. A family needs plain runs at two budgets and an
    arm; the loss is the headline metric."""
    tag = settings.headline.tag
    complete = []
    alike = grouped((_rest(s), s) for s in settings.all if s.done).values()
    for group in (of_one_text for members in alike for of_one_text in by_text(members)):
        arms = [s for s in group if not s.is_plain]
        plain = [s for s in group if s.is_plain]
        # The rate of a run that stopped early has not decayed.
        plain = [s for s in plain if not any(run.fact("stopped_early") for run in s.done)]
        flops = {s: cost.mean for s in plain if (cost := s.estimate(FLOPS).interval)}
        if len(set(flops.values())) > 1 and arms:
            curve = sorted(flops, key=flops.__getitem__)
            complete.append(Family(curve, [_valued(arm, curve, tag) for arm in arms]))
    return complete


def _rest(setting: Setting) -> str:
    """A key that an arm and the plain runs of its curve share."""
    free = (*_BUDGET, *OF_DEPTHS, *FOLLOWING)
    shared = {k: show(v) for k, v in setting.config.items() if not lies_in(k, free)}
    # Matching may have removed layers, which the config does not say.
    layers = {run.fact("compare", "n_layers") for run in setting.done} - {None}
    shared["model.n_layers"] = show(sorted(layers) or [setting.config.get("model.n_layers")])
    return json.dumps(shared, sort_keys=True)


def _valued(arm: Setting, plain: Sequence[Setting], tag: str) -> Valued:
    spent, *curve = (_spent(setting, tag) for setting in (arm, *plain))
    # The lengths that all seeds have: a curve through fewer points gives another gain.
    seeds = spent.keys() & {seed for runs in curve for seed in runs}
    curve = [runs for runs in curve if seeds <= runs.keys()]
    gain_by_seed = {
        run.seed: gain_over([runs[run.seed] for runs in curve if run.seed in runs], spent[run.seed])
        if run.seed in spent
        else "it stopped early, or has no FLOPs or no finite loss"
        for run in arm.done
    }
    gains = [gain for gain in gain_by_seed.values() if isinstance(gain, Gain)]
    missing = [f"seed {seed}: {why}" for seed, why in gain_by_seed.items() if isinstance(why, str)]
    total, price, effect = (
        None if missing else ratio_interval([getattr(gain, part) for gain in gains])
        for part in ("total", "price", "effect")
    )
    return Valued(arm, len(gains), (missing or [""])[0], total, price, effect)


def _spent(setting: Setting, tag: str) -> dict[Any, Spent]:
    """The compute and the final loss of a setting's runs, by seed."""
    spent = {}
    # The learning rate of a run that stopped early has not decayed.
    for run in (run for run in setting.done if not run.fact("stopped_early")):
        flops, loss, steps = (run.final(name) for name in (FLOPS, tag, "step"))
        if flops and flops > 0 and steps and loss is not None and math.isfinite(loss):
            spent[run.seed] = Spent(flops=flops, loss=loss, steps=steps)
    return spent
