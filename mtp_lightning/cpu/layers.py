"""The layers between the matrices on a CPU: RMSNorm, rotary positions, SwiGLU, softmax.

Each goes over memory in few passes: in C++ (``cpp/layers.cpp``) where that fits, else with few of
PyTorch's operators and a backward pass that stores little.

Shapes: M rows, C width of a row, P parts of 64 rows, R positions of a chunk, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.cpu import experts
from mtp_lightning.cpu import library as native
from mtp_lightning.cpu.linear import linear
from mtp_lightning.cpu.packed import packed_copy
from mtp_lightning.nn import ops
from mtp_lightning.nn.batch_invariant import by_row, is_batch_invariant

# Up to this many numbers, without a gradient, a single call is fastest.
_SMALL = 2**15


def rms_norm(x: Tensor, weight_C: Tensor, eps: float) -> Tensor:
    """``ops.rms_norm``."""
    if not torch.is_grad_enabled() and (x.numel() <= _SMALL or is_batch_invariant()):
        if native.fits(x, weight_C):
            x = x.contiguous()
            out, width = torch.empty_like(x), x.shape[-1]
            pointers = x.data_ptr(), weight_C.data_ptr(), out.data_ptr()
            native.lib().decode_norm(*pointers, x.numel() // max(width, 1), width, eps)
            return out
    elif x.dtype == weight_C.dtype:
        flat_MC = x.reshape(-1, x.shape[-1])
        if native.fits(flat_MC, weight_C):
            return _RMSNormNative.apply(flat_MC.contiguous(), weight_C, eps).view(x.shape)
        return _RMSNormCPU.apply(flat_MC, weight_C, eps).view(x.shape)
    return ops.rms_norm.plain(x, weight_C, eps)


class _RMSNormCPU(torch.autograd.Function):
    """Saves its input and one number per row. PyTorch composes the norm from elementary operators
    on a CPU, which takes more than twice the time and memory."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        norm_M1 = torch.linalg.vector_norm(x_MC, dim=-1, keepdim=True)
        scale_M1 = norm_M1.square_().div_(x_MC.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_MC, weight_C, scale_M1)
        return (x_MC * scale_M1).mul_(weight_C)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_MC,) = grads
        x_MC, weight_C, scale_M1 = ctx.saved_tensors
        unit_MC = x_MC * scale_M1
        product_MC = grad_MC * unit_MC
        d_weight = product_MC.sum(0)
        mean_M1 = torch.mv(product_MC, weight_C).div_(x_MC.shape[-1]).unsqueeze_(-1)
        d_x = torch.mul(grad_MC, weight_C, out=product_MC)
        return d_x.addcmul_(unit_MC, mean_M1, value=-1).mul_(scale_M1), d_weight, None


class _RMSNormNative(torch.autograd.Function):
    """The same in C++: forward and backward go over each row twice while it is in the L1 cache."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        out_MC, scale_M = torch.empty_like(x_MC), x_MC.new_empty(x_MC.shape[0])
        native.call("norm_forward", x_MC, weight_C, out_MC, scale_M, *x_MC.shape, eps)
        ctx.save_for_backward(x_MC, weight_C, scale_M)
        return out_MC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MC, weight_C, scale_M = ctx.saved_tensors
        d_x = torch.empty_like(x_MC)
        # The gain's gradient is summed in parts of 64 rows, for any number of threads.
        parts_PC = x_MC.new_empty(-(-x_MC.shape[0] // 64), x_MC.shape[1])
        arguments = (x_MC, weight_C, scale_M, grads[0].contiguous(), d_x, parts_PC)
        native.call("norm_backward", *arguments, *x_MC.shape)
        return d_x, parts_PC.sum(0), None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``ops.rotary``."""
    if x.dtype == cos.dtype:
        return _RopeCPU.apply(x, cos, sin)
    return ops.rotary.plain(x, cos, sin)


class _RopeCPU(torch.autograd.Function):
    """The rotation; its backward pass is the inverse rotation. Saves only the table."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_left, out_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin, value=sign)
    return out


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """``ops.swiglu``."""
    if packed_copy(down) is None and experts.fits(x, gate_up, down):
        return experts.feed_forward(x, gate_up, down)
    return linear(gated(linear(x, gate_up)), down)


def gated(gate_up: Tensor) -> Tensor:
    """``ops.gated``."""
    if torch.is_grad_enabled() and native.fits(gate_up) and gate_up.is_contiguous():
        return _SwiGLUNative.apply(gate_up)
    # PyTorch divides a large product among threads at places that depend on the number of rows.
    return by_row(ops.gated, gate_up)


class _SwiGLUNative(torch.autograd.Function):
    """``ops.gated`` in C++: forward and backward in one pass over memory each."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        width = gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], width)
        native.call("swiglu_forward", gate_up, out, out.numel() // max(width, 1), width)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        grad = grads[0].contiguous()
        d_gate_up, width = torch.empty_like(gate_up), grad.shape[-1]
        rows = grad.numel() // max(width, 1)
        native.call("swiglu_backward", gate_up, grad, d_gate_up, rows, width)
        return d_gate_up


def log_softmax_(logits_RV: Tensor, dtype: torch.dtype) -> Tensor:
    """``ops.log_softmax_``."""
    if dtype == torch.float32 and native.fits(logits_RV) and logits_RV.is_contiguous():
        native.call("log_softmax", logits_RV, *logits_RV.shape)
        return logits_RV
    return ops.log_softmax_.plain(logits_RV, dtype)


def exp_(x: Tensor) -> Tensor:
    """``ops.exp_``."""
    if native.fits(x) and x.is_contiguous():
        native.call("exponential", x, x.numel())
        return x
    return x.exp_()


ops.rms_norm.register("cpu", rms_norm)
ops.rotary.register("cpu", rotary)
ops.swiglu.register("cpu", swiglu)
ops.log_softmax_.register("cpu", log_softmax_)
ops.exp_.register("cpu", exp_)
