"""Dynamic weight average (Liu et al. 2019, arXiv 1803.10704, section 3.3, eq. 7).

    w_k = K softmax_k(r_k / T),    r_k = L_k(t - 1) / L_k(t - 2)

over the K tasks, the main prediction included as in the source: a task whose loss falls slowly gets
more weight. ``t`` counts windows of steps, and ``L_k(t)`` is the mean over a window. ``r_k`` is 1
in the first two windows, and where it is undefined: a depth was not computed in both of the last
two, or its loss was 0.

Cost: only reading the losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtp_lightning.objective.balance.base import Balance, Observed, multiplied, softmax_weights
from mtp_lightning.objective.plan import tasks_of
from mtp_lightning.objective.schedule.base import Progress


@dataclass(eq=False, kw_only=True)
class DWA(Balance):
    """``balance=dwa``."""

    name = "dwa"
    weighs_main = True
    stored = ("sums", "counts", "means")

    temperature: float = 2.0
    window_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        # Of the current window: summed losses and their number.
        self._sums = torch.zeros(self.depth + 1, dtype=torch.float64)
        self._counts = torch.zeros(self.depth + 1, dtype=torch.float64)
        # L_k(t - 2) and L_k(t - 1); NaN where not computed.
        self._means = torch.full((2, self.depth + 1), torch.nan, dtype=torch.float64)

    def ratios(self) -> Tensor:
        """r_k [D + 1]."""
        ratio = self._means[1] / self._means[0]
        return torch.where(ratio.isfinite(), ratio, 1.0)

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        return multiplied(
            lambdas, softmax_weights(self.ratios() / self.temperature, tasks_of(lambdas))
        )

    def update(self, observed: Observed) -> dict[str, float]:
        ratios = self.ratios().tolist()
        values = {f"balance/loss_ratio_depth_{k}": ratios[k] for k in observed.computed}
        self._sums[observed.computed] += observed.losses[observed.computed]
        self._counts[observed.computed] += 1
        if (observed.progress.step + 1) % self.window_steps == 0:
            self._means = torch.stack([self._means[1], self._sums / self._counts])
            self._sums.zero_()
            self._counts.zero_()
        return values
