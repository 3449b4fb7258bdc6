"""Routed experts: every one multiplies the tokens sent to it, and no others.

Shapes: M tokens, K chosen experts of a token, C d_model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtp_lightning.nn.kernels.experts import mix_experts


class Experts(nn.Module):
    """E SwiGLU layers; gate and up are one matrix an expert, gate first."""

    def __init__(self, d_model: int, d_expert: int, n_experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * d_expert, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_expert))

    def forward(self, x_MC: Tensor, chosen_MK: Tensor, gates_MK: Tensor) -> Tensor:
        """``sum_j gates[:, j] * expert_{chosen[:, j]}(x)``, [M, C]."""
        kind = x_MC.device.type
        # On CPUs the few rows of an expert are faster in fp32's own code.
        autocast = kind != "cpu" and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x_MC.dtype
        gate_up, down = self.gate_up.to(dtype), self.down.to(dtype)
        with torch.autocast(kind, enabled=False):
            return mix_experts(x_MC.to(dtype), chosen_MK, gates_MK.to(dtype), gate_up, down)

    def extra_repr(self) -> str:
        n_experts, d_model, d_expert = self.down.shape
        return f"{n_experts} x ({d_model}, {d_expert})"
