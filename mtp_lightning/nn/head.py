"""The output head that every prediction depth shares."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.kernels.matmul import linear


class Head(nn.Module):
    """``logits = hidden @ weight.T``; a tied head is given the embedding's parameter."""

    def __init__(self, vocab_size: int, d_model: int, *, tied: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model)) if tied is None else tied
        self.packed: Tensor | None = None

    def forward(self, h_BTC: Tensor) -> Tensor:
        """[..., C] -> logits [..., V]. Training never calls it: see objective/cross_entropy.py."""
        return linear(h_BTC, self.weight, self.packed)
