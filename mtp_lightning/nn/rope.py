"""Rotary position embedding (Su et al. 2021, eq. 34), pairing dimension j with j + H/2, and its
stretching to longer contexts as in Llama 3.1 or YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_bool, require_number


def rope_table(
    positions: Tensor,
    d_head: int,
    theta: float,
    scaling: Scaling | None = None,
    *,
    rotary_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every rotary angle.

    Args:
        positions: whole numbers of any shape [...].
        d_head: H, even.
        theta: base of the frequencies ``theta^(-2j/R)``.
        scaling: stretches the frequencies to longer contexts.
        rotary_dim: R, the number of dimensions that are rotated, even: the first R/2 pairs. The
            angles of the other pairs are 0. None is H.
        dtype: the model's.

    Returns:
        Two tensors of [..., H/2], fp32 or fp64.
    """
    rotary_dim = d_head if rotary_dim is None else rotary_dim
    half = rotary_dim // 2
    # In fp64: fp32 would round the angle of position 100,000 too coarsely.
    exponent = torch.arange(half, dtype=torch.float64, device=positions.device) / half
    frequency = theta**-exponent
    if scaling is not None:
        frequency = scaling.stretched(frequency, theta)
    angle = positions.to(torch.float64).unsqueeze(-1) * frequency
    dtype = torch.promote_types(dtype, torch.float32)
    magnitude = 1.0 if scaling is None else scaling.magnitude
    cos, sin = angle.cos() * magnitude, angle.sin() * magnitude
    padding = (0, (d_head - rotary_dim) // 2)
    cos, sin = F.pad(cos, padding, value=1.0), F.pad(sin, padding)
    return cos.to(dtype), sin.to(dtype)


def over_whole_heads(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """A :func:`rope_table` [..., H/2] as one of [..., H], signs included: see
    :func:`rotate_in_place`."""
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """``ops.rotary`` in place, in three calls and without autograd, with tables
    :func:`over_whole_heads`."""
    swapped = torch.roll(x, x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's: slow frequencies are divided by ``factor``, fast ones kept, others interpolated.

    A frequency is measured by its full turns in ``original_positions``: with fewer than
    ``low_freq_factor`` it is slow, with more than ``high_freq_factor`` fast.

    Attributes:
        factor: how many times longer the new context is.
        low_freq_factor: turns below which a frequency is divided by ``factor``.
        high_freq_factor: turns above which a frequency is kept.
        original_positions: length of the original context.

    Raises:
        UserError: a number is out of range.
    """

    magnitude: ClassVar[float] = 1.0
    score_factor: ClassVar[float] = 1.0

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_positions"):
            require_number(f"model.rope_scaling.{name}", getattr(self, name), above=0)
        if not self.high_freq_factor > self.low_freq_factor:
            raise UserError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} must be more than "
                f"low_freq_factor={self.low_freq_factor}."
            )

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """The frequencies ``theta^(-2j/R)`` for the longer context."""
        turns = frequency * self.original_positions / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept_share = ((turns - low) / (high - low)).clamp(0, 1)
        return frequency * (kept_share + (1 - kept_share) / self.factor)


@dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """YaRN's (Peng et al. 2023, arXiv 2309.00071, section 3; as in transformers and DeepSeek-V3).

    Slow frequencies are divided by ``factor``, fast ones kept, and those between interpolated
    linearly by dimension. Queries and keys are multiplied by :attr:`magnitude`.

    Attributes:
        factor: how many times longer the new context is.
        original_positions: length of the original context.
        beta_fast: turns in the original context above which a frequency is kept.
        beta_slow: turns below which a frequency is divided by ``factor``.
        mscale: DeepSeek's factor in :attr:`magnitude`; None is YaRN's own.
        mscale_all_dim: DeepSeek's factor in :attr:`score_factor`.
        attention_factor: :attr:`magnitude` itself, instead of computing it.
        truncate: whether the interpolation begins and ends at whole dimensions.

    Raises:
        UserError: a number is out of range.
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("factor", "original_positions", "beta_fast", "beta_slow"):
            require_number(f"model.rope_scaling.{name}", getattr(self, name), above=0)
        for name in ("mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, name) is not None:
                require_number(f"model.rope_scaling.{name}", getattr(self, name), least=0)
        require_bool("model.rope_scaling.truncate", self.truncate)

    @property
    def magnitude(self) -> float:
        """Factor of rotated queries and keys."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._attention_scale(self.mscale) / self._attention_scale(self.mscale_all_dim)
        return self._attention_scale(1.0)

    @property
    def score_factor(self) -> float:
        """Factor of latent attention's scores (DeepSeek-V3's released code)."""
        return self._attention_scale(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _attention_scale(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def stretched(self, frequency: Tensor, theta: float) -> Tensor:
        """The frequencies ``theta^(-2j/R)`` for the longer context."""
        last = 2 * len(frequency) - 1  # R - 1

        def dimension(turns: float) -> float:
            wave = self.original_positions / (turns * 2 * math.pi)
            return (last + 1) * math.log(wave) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, last)
        high += 0.001 if low == high else 0.0
        place = torch.arange(len(frequency), dtype=frequency.dtype, device=frequency.device)
        divided = ((place - low) / (high - low)).clamp(0, 1)
        return frequency * (1 - divided + divided / self.factor)


Scaling = Llama3Scaling | YarnScaling


def rope_scaling(fields: Mapping[str, Any]) -> Scaling:
    """The scaling described by plain data; its fields tell which kind it is."""
    kind = Llama3Scaling if "low_freq_factor" in fields else YarnScaling
    return kind(**fields)
