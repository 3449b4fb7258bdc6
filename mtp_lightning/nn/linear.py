"""Layers of one matrix: linear without bias, and lookup tables."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from mtp_lightning.nn.ops import linear


class Linear(nn.Module):
    """``x @ weight.T`` with a weight of [out_features, in_features]."""

    # Whether a frozen weight may be held in bf16 (Trunk.hold_in_bf16).
    may_be_bf16: ClassVar[bool] = True

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


class ZeroLinear(Linear):
    """``x @ weight.T``, 0 at the start: a sum with it starts as the other summand."""

    @torch.no_grad()
    def reset_own_weights(self) -> None:
        """Start at zero; the model calls this after it has drawn all weights."""
        self.weight.zero_()


def embedding(rows: int, width: int) -> nn.Embedding:
    """A lookup table [rows, width], not yet initialized: PyTorch's own initialization, on the
    ``meta`` device, would import 800 modules."""
    return nn.Embedding.from_pretrained(torch.empty(rows, width), freeze=False)
