"""The scales of a matrix whose numbers are stored in blocks of few bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class WeightScales:
    """Block scales of a matrix [N, K] with entries ``step x q + offset``, of integers q >= 0 of
    ``bits`` bits; steps and offsets are fp32, [N, K / group], for blocks of ``group`` inputs."""

    steps: Tensor
    offsets: Tensor
    group: int
    bits: int

    def regrouped(self, group: int) -> WeightScales:
        """The same scales, repeated for smaller blocks."""
        times = self.group // group
        steps, offsets = (x.repeat_interleave(times, dim=1) for x in (self.steps, self.offsets))
        return replace(self, steps=steps, offsets=offsets, group=group)

    @staticmethod
    def joined(parts: Sequence[WeightScales], order: Sequence[int] | None) -> WeightScales:
        """The scales of several matrices, one below the other, as one; row i is row ``order[i]``
        of all their rows."""
        group, bits = min(part.group for part in parts), max(part.bits for part in parts)
        scales = [part.regrouped(group) for part in parts]
        steps, offsets = (torch.cat([getattr(p, n) for p in scales]) for n in ("steps", "offsets"))
        if order is not None:
            steps, offsets = steps[list(order)], offsets[list(order)]
        return WeightScales(steps=steps, offsets=offsets, group=group, bits=bits)
