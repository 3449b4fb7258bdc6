"""How sure a depth is of its draft: a number beside the hidden state (DSpark, arXiv 2607.05147)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Confidence(nn.Module):
    """A linear layer a depth, from its hidden state to the logit of the acceptance.

    Args:
        depth: D.
        d_model: C.
    """

    def __init__(self, depth: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(depth, d_model))
        self.bias = nn.Parameter(torch.empty(depth))

    def forward(self, k: int, hidden: Tensor) -> Tensor:
        """The logit [...] of depth ``k`` for a state [..., C]; beyond D, the last one's."""
        row = slice(min(k, len(self.bias)) - 1, min(k, len(self.bias)))
        return F.linear(hidden, self.weight[row].to(hidden.dtype), self.bias[row].to(hidden.dtype))[
            ..., 0
        ]
