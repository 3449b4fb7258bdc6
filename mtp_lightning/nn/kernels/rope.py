"""Turning heads by rotary angles, with nothing kept for backward but the table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mtp_lightning.nn.kernels.eager import eager_cpu


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (j, j + H/2) of ``x`` [..., H].

    Args:
        x: heads.
        cos, sin: of the angles, broadcast against [..., H/2].
    """
    if eager_cpu(x) and x.dtype == cos.dtype:
        return _RopeCPU.apply(x, cos, sin)
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x.dtype)


def turn_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """:func:`apply_rope` in three calls and without autograd; the table is over whole heads,
    [..., H], signs included."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)


class _RopeCPU(torch.autograd.Function):
    """The turn and, backward, the turn the other way."""

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
