"""Weights from learned uncertainties (Kendall et al. 2018, arXiv 1705.07115, eq. 10).

    sum_k lambda_k (L_k e^{-s_k} + s_k / 2),    s_k = log sigma_k^2,  s_k(0) = 0

over all tasks, the main prediction included as in the source. With lambda_k = 1 this is the
published objective. Here lambda_k multiplies the whole term: the optimum is ``e^{-s_k} = 1 /
(2 L_k)`` for any lambda_k, so the factor of ``L_k``, ``lambda_k e^{-s_k}``, stays proportional to
lambda_k.

The ``s_k`` are parameters of the run's optimizer, at its learning rate and without gradient
clipping (weight decay: :meth:`Balance.parameters`). Their gradients are computed in closed form,
``lambda_k (1/2 - L_k e^{-s_k})``, from the step's losses over all ranks. The logged ``train/loss``
is the weighted sum of the losses, without the ``s_k / 2``.

Cost: only reading the losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mtp_lightning.objective.balance.base import Balance, Observed
from mtp_lightning.objective.schedule.base import Progress


class Uncertainty(Balance):
    """``balance=uncertainty``."""

    name = "uncertainty"
    weighs_main = True

    def __post_init__(self) -> None:
        super().__post_init__()
        # One parameter per task: that of a depth that is switched off has no gradient, so the
        # optimizer does not change it.
        self._log_variances = [
            nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(self.depth + 1)
        ]

    def factors(self, lambdas: Sequence[float], progress: Progress) -> list[float]:
        return [x * math.exp(-s.item()) for x, s in zip(lambdas, self._log_variances, strict=True)]

    def update(self, observed: Observed) -> dict[str, float]:
        values = {}
        for k in observed.computed:
            s = self._log_variances[k]
            gradient = observed.lambdas[k] / 2 - observed.factors[k] * float(observed.losses[k])
            s.grad = torch.full_like(s, gradient)
            values[f"balance/log_variance_depth_{k}"] = s.item()
        return values

    def parameters(self) -> list[nn.Parameter]:
        return self._log_variances

    def state_dict(self) -> dict[str, Any]:
        return {"log_variances": [s.item() for s in self._log_variances]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for s, value in zip(self._log_variances, state["log_variances"], strict=True):
            s.fill_(value)
