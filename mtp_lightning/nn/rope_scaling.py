"""Stretching rotary frequencies to longer contexts, as Llama 3.1 does."""

from __future__ import annotations

from dataclasses import dataclass


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
        ValueError: a number out of range.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_positions: int

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "original_positions"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"model.rope_scaling.{name} must be above 0, not {value}.")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"model.rope_scaling.high_freq_factor={self.high_freq_factor} must be more than "
                f"low_freq_factor={self.low_freq_factor}."
            )
