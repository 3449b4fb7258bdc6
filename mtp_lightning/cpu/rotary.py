"""The rotary turn of heads, with nothing kept for the backward pass but the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.nn import ops


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``ops.rotary``."""
    if x.dtype == cos.dtype:
        return _RopeCPU.apply(x, cos, sin)
    return ops.rotary.plain(x, cos, sin)


class _RopeCPU(torch.autograd.Function):
    """The turn; backward, the turn the other way."""

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


ops.rotary.register("cpu", rotary)
