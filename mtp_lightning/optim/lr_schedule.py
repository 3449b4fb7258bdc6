"""Learning-rate schedules: pure functions of the optimizer step, so that a resumed run continues
exactly.

- ``cosine``: warm-up, then half a cosine down to ``min_ratio``
- ``wsd``: warm-up, stable, then a linear decay to ``min_ratio`` (MiniCPM, Hu et al. 2024; Haegele
  et al. 2024)
- ``constant``: warm-up, then 1
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

from mtp_lightning.command_line.check_config import check_settings
from mtp_lightning.errors import UserError


@dataclass
class LRSchedule:
    """Multiplier of the base learning rate, in [0, 1]. The comments of conf/optimizer/schedule
    explain and limit the settings; a wrong one raises a :class:`UserError`.

    Steps s count from 0. The warm-up rises linearly, (s + 1) / warm-up, so that the first step
    already learns; the decay would reach `min_ratio` at s = max_steps, one step after the last one.
    """

    kind: str = "cosine"
    _: KW_ONLY
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    decay_fraction: float = 0.2
    min_ratio: float = 0.1

    def __post_init__(self) -> None:
        check_settings(self, "optimizer.schedule")
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise UserError(
                f"Give warmup_steps ({self.warmup_steps}) or warmup_fraction "
                f"({self.warmup_fraction}), not both: set the other one to null."
            )

    def __call__(self, step: int, max_steps: int) -> float:
        """The multiplier at optimizer step `step` (from 0) of a run of `max_steps`."""
        # Rounded, so that 0.07 of 100 steps is 7 steps and not one ulp more, which would be 8.
        warmup = self.warmup_steps or math.ceil(round((self.warmup_fraction or 0) * max_steps, 6))
        rise = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
        begin = warmup if self.kind == "cosine" else max_steps * (1 - self.decay_fraction)
        if self.kind == "constant" or step < begin:
            return rise
        remaining = 0.0  # fraction of the decay that is still to come
        if step < max_steps:
            share = (step - begin) / (max_steps - begin)
            cosine = 0.5 * (1 + math.cos(math.pi * share))
            remaining = cosine if self.kind == "cosine" else 1 - share
        decayed = min(1.0, max(0.0, self.min_ratio + (1 - self.min_ratio) * remaining))
        # The minimum covers a warm-up that overlaps the decay (short trial runs of a long recipe).
        return min(rise, decayed)
