"""A linear layer without bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.kernels.matmul import Packed, linear, pack


class Linear(nn.Module):
    """``x @ weight.T``; the weight is [out_features, in_features].

    Attributes:
        packed: the weight as ``kernels.matmul.packed_weights`` lays it out for decoding.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.packed: Packed | None = None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.packed)

    def pack(self) -> Packed | None:
        return pack(self.weight)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"
