"""The SwiGLU feed-forward layer (Shazeer 2020, eq. 6)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtp_lightning.nn.attention import Positions
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.eager import eager_cpu
from mtp_lightning.nn.linear import Linear


class _SwiGLUCPU(torch.autograd.Function):
    """``silu(gate) * up``, keeping only its input: the sigmoid is cheaper to redo than to read."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, dim=-1)
        scratch = F.silu(gate)
        torch.mul(grad, scratch, out=d_up)
        torch.mul(grad, up, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=d_gate)
        return d_gate_up


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: the first half gates the second."""
    grad = torch.is_grad_enabled()
    if grad and eager_cpu(gate_up):
        return _SwiGLUCPU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if not grad:
        return F.silu(gate).mul_(up)
    return F.silu(gate) * up


class FeedForward(nn.Module):
    """``down(silu(gate(x)) * up(x))``; gate and up are one matrix, gate first."""

    def __init__(self, config: TrunkConfig, *, d_ff: int | None = None) -> None:
        super().__init__()
        d_ff = config.d_ff if d_ff is None else d_ff
        self.gate_up = Linear(config.d_model, 2 * d_ff)
        self.down = Linear(d_ff, config.d_model)

    def forward(self, x_BTC: Tensor, positions: Positions | None = None) -> Tensor:
        """[B, T, C] -> [B, T, C]; what a layer has to report goes to ``positions.ledger``."""
        return self.down(swiglu(self.gate_up(x_BTC)))
