"""Stretching of rotary frequencies to longer contexts, as in Llama 3.1 or as in YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_bool, require_number


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
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
            return self._length(self.mscale) / self._length(self.mscale_all_dim)
        return self._length(1.0)

    @property
    def score_factor(self) -> float:
        """Factor of latent attention's scores (DeepSeek-V3's released code)."""
        return self._length(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _length(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def blend(self, d_head: int, theta: float) -> tuple[float, float]:
        """The dimensions among the H/2 between which frequencies go from kept to divided."""

        def place(turns: float) -> float:
            wave = self.original_positions / (turns * 2 * math.pi)
            return d_head * math.log(wave) / (2 * math.log(theta))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_head - 1)
        return low, high + 0.001 if low == high else high


def rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | YarnScaling:
    """The scaling described by plain data; its fields tell which kind it is."""
    kind = RopeScaling if "low_freq_factor" in fields else YarnScaling
    return kind(**fields)
