"""An estimate of whether a depth's draft will be accepted (DSpark, arXiv 2607.05147)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Confidence(nn.Module):
    """One linear layer per depth, from its hidden state to the logit of acceptance."""

    def __init__(self, depth: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, d_model))
        self.bias = nn.Parameter(torch.empty(depth))

    def forward(self, k: int, hidden: Tensor) -> Tensor:
        """The logits [...] of depth ``k`` for states [..., C]; a depth beyond D uses layer D."""
        row = slice(min(k, len(self.bias)) - 1, min(k, len(self.bias)))
        return F.linear(hidden, self.weight[row].to(hidden.dtype), self.bias[row].to(hidden.dtype))[
            ..., 0
        ]
