"""The share of a head's rejections that no head could avoid, at each validation."""

from __future__ import annotations

from dataclasses import dataclass, field

import lightning.pytorch as pl
import torch
from torch import Tensor

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.metrics.floor import Floors, floors
from mtp_lightning.model import MTPModel


@dataclass(eq=False)
class FloorAndGap(SpeculativeEval):
    """Logs ``val/rejection_depth_k``, ``val/recall_16_depth_k``, and for every order m < k
    ``val/floor_depth_k_order_m`` and ``val/gap_depth_k_order_m``: metrics/floor.py.

    They are measured on text that the model itself writes after held-out prompts. Every prompt has
    its own random stream, the same at every validation. A model whose depths do not predict one
    token each, or skip tokens (``mtp.stride``), logs nothing.
    """

    prompt_tokens: int = 64
    new_tokens: int = field(default=2, init=False)
    rollouts: int = 64
    seen: int = 8

    def measure(
        self, trainer: pl.Trainer, model: MTPModel, prompts: list[Tensor], new_tokens: int
    ) -> dict[str, float]:
        if model.token_depth == 0 or model.config.mtp.stride != 1:
            return {}
        sizes = {"rollouts": self.rollouts, "seen": self.seen}
        by_prompt = [
            Floors(model, prompt, torch.Generator().manual_seed(number), **sizes).measure()
            for number, prompt in enumerate(prompts)
        ]
        return {f"val/{name}": value for name, value in floors(by_prompt).items()}
