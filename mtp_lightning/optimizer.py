"""AdamW over a model, with its learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mtp_lightning.lr_schedule import LRSchedule


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Loshchilov & Hutter 2019) and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        betas: decay of the first and second moments.
        eps: of the denominator.
        weight_decay: of matrices; norm gains and other vectors are never decayed.
        schedule: multiplier of ``lr``, a function of the step.
    """

    lr: float
    betas: Sequence[float]
    eps: float
    weight_decay: float
    schedule: LRSchedule

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay"):
            value = getattr(self, name)
            if not isinstance(value, int | float):
                raise ValueError(f"optimizer.{name} must be a number, not {value!r}.")
        if not self.lr > 0:
            raise ValueError(f"optimizer.lr must be above 0, not {self.lr}.")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1), not {self.betas}.")
        if self.weight_decay < 0:
            raise ValueError(f"optimizer.weight_decay must be 0 or more, not {self.weight_decay}.")

    def build(
        self, model: torch.nn.Module, others: Sequence[torch.nn.Parameter] = ()
    ) -> torch.optim.AdamW:
        """The optimizer over the model's trainable parameters, and ``others`` without decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        if others:
            groups.append({"params": list(others), "weight_decay": 0.0})
        fused = trained[0].device.type in ("cpu", "cuda")
        betas = (self.betas[0], self.betas[1])
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused)
