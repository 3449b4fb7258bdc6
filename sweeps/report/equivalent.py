"""Compute-equivalent gain: how much plain training the same loss would have cost.

Plain next-token training reaches a loss L with ``C_plain(L)`` FLOPs. A run that ends at L and has
spent C has

    gain = C_plain(L) / C = price x effect

where 1 means that it pays for itself. The *price* is (FLOPs of a plain step) / (FLOPs of the run's
step), a fact about the two models. The *effect* is what is left: what a step of the run is worth
in plain steps.

The plain curve is of runs that are each trained to their end, with the same seed and, where the
learning rate decays, with the same share of decay: a run that was stopped early has not annealed.
Between its points log C is interpolated over L by a monotone cubic (Fritsch & Carlson 1980, SIAM J.
Numer. Anal. 17); a loss beyond them has no gain, since nothing is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Spent:
    """What a run came to.

    Attributes:
        flops: training FLOPs of the whole run.
        loss: at its end; lower is better.
        steps: optimizer steps.
    """

    flops: float
    loss: float
    steps: float


@dataclass(frozen=True)
class Gain:
    """Of one run.

    Attributes:
        total: ``C_plain(L) / C``.
        price: FLOPs of a plain step by those of the run's.
    """

    total: float
    price: float

    @property
    def effect(self) -> float:
        """What a step is worth in plain steps."""
        return self.total / self.price


class PlainCurve:
    """``C_plain(L)`` through plain runs.

    Args:
        runs: at least two, of different lengths.

    Raises:
        ValueError: too few, or more compute did not always make the loss lower.
    """

    def __init__(self, runs: Sequence[Spent]) -> None:
        from scipy.interpolate import PchipInterpolator

        self.runs = sorted(runs)
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

    def gain(self, run: Spent) -> Gain | None:
        """Of a run; None where its loss is beyond the curve."""
        flops = self.flops_at(run.loss)
        if flops is None:
            return None
        # A plain step costs the same at every length.
        plain = self.runs[-1].flops / self.runs[-1].steps
        return Gain(total=flops / run.flops, price=plain / (run.flops / run.steps))
