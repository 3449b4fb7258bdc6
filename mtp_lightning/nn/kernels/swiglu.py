"""The gate of a SwiGLU layer, keeping little for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.nn.kernels.eager import eager_cpu


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``, [..., 2F] -> [..., F]: the first half gates the second."""
    grad = torch.is_grad_enabled()
    if grad and eager_cpu(gate_up):
        return _SwiGLUCPU.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    if not grad:
        return F.silu(gate).mul_(up)
    return F.silu(gate) * up


class _SwiGLUCPU(torch.autograd.Function):
    """Keeps only its input: the sigmoid is cheaper to redo than to read."""

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
