"""Stretching rotary frequencies to longer contexts, as Llama 3.1 does, or as YaRN."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtp_lightning.errors import UserError
from mtp_lightning.settings import require_bool, require_number


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slow frequencies divided by ``factor``, fast ones kept, those between blended (Llama 3.1).

    A frequency is measured by the turns it makes in ``original_positions``: with fewer than
    ``low_freq_factor`` it is slow, with more than ``high_freq_factor`` fast.

    Attributes:
        factor: how much longer the context became.
        low_freq_factor: turns below which a frequency is divided whole.
        high_freq_factor: turns above which it is kept.
        original_positions: the context before.

    Raises:
        UserError: a number out of range.
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
    """Slow frequencies divided by ``factor``, fast ones kept, those between blended by their place
    among the dimensions, and queries and keys lengthened (YaRN, Peng et al. 2023, arXiv 2309.00071,
    section 3; as transformers and DeepSeek-V3 compute it).

    Attributes:
        factor: how much longer the context became.
        original_positions: the context before.
        beta_fast: turns in it above which a frequency is kept.
        beta_slow: turns below which it is divided whole.
        mscale: of DeepSeek's, what queries and keys are lengthened by; None is YaRN's own.
        mscale_all_dim: of DeepSeek's, what latent attention's scores are multiplied by.
        attention_factor: the length itself, instead of what follows from the others.
        truncate: the blend begins and ends at whole dimensions.

    Raises:
        UserError: a number out of range.
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
        """What rotated queries and keys are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._length(self.mscale) / self._length(self.mscale_all_dim)
        return self._length(1.0)

    @property
    def score_factor(self) -> float:
        """What latent attention's scores are multiplied by (DeepSeek-V3's released code)."""
        return self._length(self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _length(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

    def blend(self, d_head: int, theta: float) -> tuple[float, float]:
        """The places of H/2 between which frequencies go from kept to divided."""

        def place(turns: float) -> float:
            wave = self.original_positions / (turns * 2 * math.pi)
            return d_head * math.log(wave) / (2 * math.log(theta))

        low, high = place(self.beta_fast), place(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, d_head - 1)
        return low, high + 0.001 if low == high else high


def rope_scaling(fields: Mapping[str, Any]) -> RopeScaling | YarnScaling:
    """A stretch from plain data; each kind has fields of its own."""
    kind = RopeScaling if "low_freq_factor" in fields else YarnScaling
    return kind(**fields)
