"""Steers the ratio of each depth's gradient to the main one's on the trunk (this project's own).

    log lambda_k += u sign(r - EMA(lambda_k |g_k| / |g_0|)),    lambda_k in [0.01, 1]

Like the experts' bias (Wang et al. 2024, arXiv 2408.15664), it takes a step of fixed size in the
right direction and adds no loss term. ``g`` is measured on the whole shared trunk. A depth's lambda
starts from the schedule's weight in the first step that computes it. From then on the rule sets it:
later changes of the schedule are ignored, except that 0 still switches the depth off. The moving
average starts from the first ratio; a measurement with ``|g_0| = 0`` is left out. Lambdas are fixed
in the last share ``frozen`` of the run.

Cost: that of :func:`task_gradients` on the whole shared trunk, in a step that measures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_lightning.objective.balance.base import Balance, Observed
from mtp_lightning.objective.plan import depths_of
from mtp_lightning.objective.schedule.base import Progress

_SMALLEST, _LARGEST = 0.01, 1.0


@dataclass(eq=False, kw_only=True)
class TrunkRatio(Balance):
    """``balance=trunk_ratio``."""

    name = "trunk_ratio"
    scope = "trunk"
    stored = ("lambdas", "ratios")

    rate: float = 0.01
    ratio: float = 0.3
    ema: float = 0.9
    every_n_steps: int = 10
    frozen: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        # By depth; a depth is missing before it is first computed.
        self._lambdas: dict[int, float] = {}
        self._ratios: dict[int, float] = {}

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        own = [self._lambdas.get(k, _clipped(x)) if x else 0.0 for k, x in enumerate(lambdas)]
        return [lambdas[0], *own[1:]]

    def rests_at(self, progress: Progress) -> bool:
        return progress.fraction + self.frozen >= 1  # 1 - 0.18 is above 82 / 100

    def update(self, observed: Observed) -> dict[str, float]:
        values = {}
        norms = None if observed.gradients is None else observed.gradients.norms
        for k in depths_of(observed.factors):
            weight = self._lambdas.setdefault(k, observed.factors[k])
            if norms is not None and norms[0]:
                share = weight * norms[k] / norms[0]
                before = self._ratios.get(k, share)
                self._ratios[k] = self.ema * before + (1 - self.ema) * share
                error = self.ratio - self._ratios[k]
                direction = (error > 0) - (error < 0)
                self._lambdas[k] = _clipped(weight * math.exp(self.rate * direction))
            if k in self._ratios:
                values[f"balance/trunk_ratio_depth_{k}"] = self._ratios[k]
        return values


def _clipped(weight: float) -> float:
    return min(max(weight, _SMALLEST), _LARGEST)
