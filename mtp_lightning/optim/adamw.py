"""AdamW (Loshchilov & Hutter 2019), weight decay on matrices only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mtp_lightning.command_line.check_config import check_settings
from mtp_lightning.optim.base import OptimizerConfig
from mtp_lightning.settings import is_number, require


@dataclass(frozen=True, kw_only=True)
class AdamWConfig(OptimizerConfig):
    """``optimizer=adamw``. The comments of its file in conf/optimizer explain and limit the
    settings; a wrong one raises a :class:`UserError`."""

    lr: float
    betas: Sequence[float]
    eps: float
    weight_decay: float
    schedule: Callable[[int, int], float]

    def __post_init__(self) -> None:
        check_settings(self, "optimizer")
        fits = len(self.betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in self.betas)
        require(fits, "optimizer.betas", list(self.betas), "two numbers in [0, 1)")

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
        betas = (float(self.betas[0]), float(self.betas[1]))  # a 0 may be typed as int
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=fused)
