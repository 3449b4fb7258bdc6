"""GradNorm (Chen et al. 2018, arXiv 1711.02257, section 3, algorithm 1).

    G_k = w_k |g_k|,  target_k = mean(G) * r_k^alpha,  r_k = (L_k / L_k(0)) / mean_j(L_j / L_j(0))
    w <- w - lr * d/dw sum_k |G_k - target_k|,    then renormalized to sum K

over the K tasks, the main prediction included as in the source. ``g_k`` is measured on the last
block of the shared trunk, and the targets are constants. A task that has learned less than the
others gets a larger gradient. The derivative is ``sign(G_k - target_k) |g_k|``; the step is plain
gradient descent. Weights are clamped to at least 0.01 before they are renormalized, since the
formula alone lets them become negative. ``G_k`` does not include lambda_k: the rule balances the
unweighted losses, and lambda_k multiplies the result. ``L_k(0)`` is the first loss observed.

Cost: that of :func:`task_gradients` on the last block, in a step that measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_lightning.objective.balance.base import Balance, Observed, multiplied
from mtp_lightning.objective.schedule.base import Progress

_SMALLEST = 0.01


@dataclass(eq=False, kw_only=True)
class GradNorm(Balance):
    """``balance=gradnorm``."""

    name = "gradnorm"
    scope = "last_block"
    weighs_main = True
    stored = ("weights", "first")

    alpha: float = 1.5
    lr: float = 0.025
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._weights = torch.ones(self.depth + 1, dtype=torch.float64)
        # L_k(0); NaN before it is known.
        self._first = torch.full((self.depth + 1,), torch.nan, dtype=torch.float64)

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        return multiplied(lambdas, self._weights)

    def update(self, observed: Observed) -> dict[str, float]:
        tasks = observed.computed
        losses = observed.losses[tasks]
        first = self._first[tasks]
        self._first[tasks] = torch.where(first.isnan(), losses, first)
        if observed.gradients is not None:
            norms = torch.tensor(list(observed.gradients.norms.values()), dtype=torch.float64)
            ratios = losses / self._first[tasks]
            rate = ratios / ratios.mean()
            rate = torch.where(rate.isfinite(), rate, 1.0)  # undefined where losses are 0
            weights = self._weights[tasks]
            weighted = weights * norms
            target = weighted.mean() * rate**self.alpha
            weights = weights - self.lr * torch.sign(weighted - target) * norms
            weights = weights.clamp(min=_SMALLEST)
            self._weights[tasks] = weights * len(tasks) / weights.sum()
        return {f"balance/weight_depth_{k}": float(self._weights[k]) for k in tasks}
