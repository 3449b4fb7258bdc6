"""Rotary position embedding (Su et al. 2021, eq. 34), pairing dimension j with j + H/2."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.nn.eager import eager_cpu
from mtp_lightning.nn.rope_scaling import RopeScaling


def rope_table(
    positions: Tensor, d_head: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle.

    Args:
        positions: whole numbers of any shape [...].
        d_head: H, even.
        theta: base of the frequencies ``theta^(-2j/H)``.
        scaling: what is done to them.

    Returns:
        Two fp32 tensors of [..., H/2].
    """
    half = d_head // 2
    # In double precision: the angle of position 100,000 is not exact in fp32.
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    frequency = theta**-exponent if scaling is None else _stretch(theta**-exponent, scaling)
    angle = positions.to(torch.float64).unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def _stretch(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    turns = frequency * scaling.original_positions / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    out_left, out_right = out.chunk(2, dim=-1)
    torch.mul(left, cos, out=out_left).addcmul_(right, sin, value=-sign)
    torch.mul(right, cos, out=out_right).addcmul_(left, sin, value=sign)
    return out


class _RopeCPU(torch.autograd.Function):
    """The turn and, backward, the turn the other way; nothing but the table is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, sin, -1.0), None, None


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``x`` [..., H] by the angles of :func:`rope_table`, broadcast against it."""
    if eager_cpu(x) and x.dtype == cos.dtype:
        return _RopeCPU.apply(x, cos, sin)
    left, right = x.chunk(2, dim=-1)
    turned = torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)
    return turned.to(x.dtype)


def whole_head_table(
    positions: Tensor, d_head: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`rope_table` over whole heads, [..., H], signs included, for :func:`turn_in_place`."""
    cos, sin = rope_table(positions, d_head, theta, scaling)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def turn_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """:func:`apply_rope` in three calls and without autograd, with a :func:`whole_head_table`."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)
