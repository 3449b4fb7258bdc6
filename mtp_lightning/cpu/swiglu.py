"""SwiGLU layers: whole ones in C++ where that fits, else their products and a gate that keeps
little for its backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.cpu import experts
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.linear import linear
from mtp_lightning.cpu.packed import packed_copy
from mtp_lightning.nn import ops


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``ops.swiglu``."""
    if packed_copy(down) is None and experts.fits(x, gate_up, down):
        return experts.feed_forward(x, gate_up, down)
    return linear(gated(linear(x, gate_up)), down)


def gated(gate_up: Tensor) -> Tensor:
    """``ops.gated``."""
    if not torch.is_grad_enabled():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    if native.fits(gate_up) and gate_up.is_contiguous():
        return _SwiGLUNative.apply(gate_up)
    return _SwiGLUCPU.apply(gate_up)


class _SwiGLUCPU(torch.autograd.Function):
    """Keeps its input alone: computing the sigmoid again is cheaper than reading it."""

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


class _SwiGLUNative(torch.autograd.Function):
    """The same in C++, each way in one pass."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        rows = out.numel() // max(width, 1)
        native.lib().swiglu_forward(gate_up.data_ptr(), out.data_ptr(), rows, width)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_gate_up = torch.empty_like(gate_up)
        width = grad.shape[-1]
        pointers = (x.data_ptr() for x in (gate_up, grad, d_gate_up))
        native.lib().swiglu_backward(*pointers, grad.numel() // max(width, 1), width)
        return d_gate_up


ops.swiglu.register("cpu", swiglu)
