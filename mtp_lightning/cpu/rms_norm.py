"""Root-mean-square normalization in few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.cpu import library as native
from mtp_lightning.nn import ops
from mtp_lightning.nn.batch_invariant import is_batch_invariant

# Up to so many numbers, without a gradient, the fewest calls are the fastest.
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
    """Keeps its input and one number a row for the backward pass. PyTorch composes the norm of
    elementary steps on a CPU, which takes more than twice the time and memory."""

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
    """The same in C++, each way in two passes over a row while it is in the first cache."""

    @staticmethod
    def forward(ctx: Any, x_MC: Tensor, weight_C: Tensor, eps: float) -> Tensor:
        out_MC, scale_M = torch.empty_like(x_MC), x_MC.new_empty(x_MC.shape[0])
        pointers = (t.data_ptr() for t in (x_MC, weight_C, out_MC, scale_M))
        native.lib().norm_forward(*pointers, *x_MC.shape, eps)
        ctx.save_for_backward(x_MC, weight_C, scale_M)
        return out_MC

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_MC, weight_C, scale_M = ctx.saved_tensors
        d_x = torch.empty_like(x_MC)
        # The gain's gradient is a sum of parts of 64 rows, whichever threads compute them.
        parts_PC = x_MC.new_empty(-(-x_MC.shape[0] // 64), x_MC.shape[1])
        used = (x_MC, weight_C, scale_M, grads[0].contiguous(), d_x, parts_PC)
        native.lib().norm_backward(*(t.data_ptr() for t in used), *x_MC.shape)
        return d_x, parts_PC.sum(0), None


ops.rms_norm.register("cpu", rms_norm)
