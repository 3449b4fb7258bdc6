"""Rotary position embedding (Su et al. 2021, eq. 34), pairing dimension j with j + H/2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.nn.rope_scaling import RopeScaling, YarnScaling


def rope_table(
    positions: Tensor,
    d_head: int,
    theta: float,
    scaling: RopeScaling | YarnScaling | None = None,
    *,
    turned: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle.

    Args:
        positions: whole numbers of any shape [...].
        d_head: H, even.
        theta: base of the frequencies ``theta^(-2j/R)``.
        scaling: how the frequencies are stretched to longer contexts.
        turned: R, the number of dimensions that are rotated, even: the first R/2 pairs. The angles
            of the other pairs are 0. None is H.
        dtype: the model's; the tables are at least fp32.

    Returns:
        Two tensors of [..., H/2], fp32 or fp64.
    """
    turned = d_head if turned is None else turned
    half = turned // 2
    # In fp64: fp32 would round the angle of position 100,000 too coarsely.
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    frequency = theta**-exponent
    if isinstance(scaling, YarnScaling):
        frequency = _blend(frequency, scaling, *scaling.blend(turned, theta))
    elif scaling is not None:
        frequency = _stretch(frequency, scaling)
    angle = positions.to(torch.float64).unsqueeze(-1) * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    cos, sin = angle.cos(), angle.sin()
    if isinstance(scaling, YarnScaling):
        cos, sin = cos * scaling.magnitude, sin * scaling.magnitude
    at_rest = (0, (d_head - turned) // 2)
    cos, sin = F.pad(cos, at_rest, value=1.0), F.pad(sin, at_rest)
    return cos.to(dtype), sin.to(dtype)


def _blend(frequency: Tensor, scaling: YarnScaling, low: float, high: float) -> Tensor:
    place = torch.arange(len(frequency), dtype=frequency.dtype, device=frequency.device)
    divided = ((place - low) / (high - low)).clamp(0, 1)
    return frequency * (1 - divided + divided / scaling.factor)


def _stretch(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    turns = frequency * scaling.original_positions / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (kept + (1 - kept) / scaling.factor)


def over_whole_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A :func:`rope_table` [..., H/2] as one of [..., H], signs included: see
    :func:`turn_in_place`."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def turn_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``ops.rotary`` in place, in three calls and without autograd, with tables
    :func:`over_whole_heads`."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)
