"""Tables that all passes over caches share: positions, rotary angles and masks.

Shapes: B rows, T new positions, S capacity, P stored positions that a pass reads, H head size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.rope import over_whole_heads, rope_table

# Passes read a multiple of this many positions: attention over whole vectors of 16 fp32 gives the
# same bits for any number of masked positions after the last visible one.
_ROUND = 16


def round_up(n: int) -> int:
    return -(-n // _ROUND) * _ROUND


class Spans:
    """One span of T (``width``) consecutive positions in every row of buffers [B, S, ..], with its
    first position in ``starts``; ``uniform`` is whether all rows have the same one."""

    def __init__(self, tables: PositionTables, starts: Sequence[int], width: int) -> None:
        self.tables = tables
        self.starts = list(starts)
        self.width = width
        self.uniform = len(starts) == 1 or starts.count(starts[0]) == len(starts)
        if not self.uniform:
            # Rows and positions are one axis: storing by one index is several times faster than by
            # two.
            places = [row * tables.capacity + start for row, start in enumerate(starts)]
            self._flat = torch.tensor(places, device=tables.device)
            if width != 1:
                self._flat = (self._flat.unsqueeze(1) + tables.columns_S[:width]).flatten()

    @cached_property
    def positions(self) -> Tensor:
        """The positions [B, T]; [1, T] if the spans are uniform."""
        if self.uniform:
            return self.tables.columns_S.narrow(0, self.starts[0], self.width).unsqueeze(0)
        return (self._flat % self.tables.capacity).view(len(self.starts), self.width)

    def read(self, buffer: Tensor, ahead: int = 0) -> Tensor:
        """The span, moved ``ahead`` positions, of a buffer [B, S, ..]: [B, T, ..]; a view if the
        spans are uniform."""
        if self.uniform:
            return buffer.narrow(1, self.starts[0] + ahead, self.width)
        flat = self._flat + ahead if ahead else self._flat
        rows = buffer.flatten(0, 1).index_select(0, flat)
        return rows.view(len(self.starts), self.width, *buffer.shape[2:])

    def write(self, buffer: Tensor, values: Tensor, ahead: int = 0) -> None:
        """Write [B, T, ..] to the span, moved ``ahead`` positions, of a buffer [B, S, ..]."""
        if self.uniform:
            buffer.narrow(1, self.starts[0] + ahead, self.width).copy_(values)
        else:
            flat = self._flat + ahead if ahead else self._flat
            values = values.flatten(0, 1).to(buffer.dtype)
            buffer.flatten(0, 1).index_copy_(0, flat, values)


class PositionTables:
    """Rotary angles and causal masks of all positions up to a capacity S, which is rounded up,
    computed once; ``dtype`` is that of keys, values and masks."""

    def __init__(
        self,
        config: TrunkConfig,
        capacity: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.capacity = round_up(capacity)
        self.device = torch.device(device)
        self.dtype = dtype
        self.columns_S = torch.arange(self.capacity, device=device)

        cos, sin = over_whole_heads(*rope_table(self.columns_S, **config.rotary, dtype=dtype))
        self.cos_S1H, self.sin_S1H = cos.unsqueeze(1), sin.unsqueeze(1)
        # The values of additive masks.
        self.visible = torch.zeros((), device=device, dtype=dtype)
        self.hidden = torch.full_like(self.visible, -math.inf)

    def at_each(self, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary table of any positions, [B, T, 1, H]."""
        flat, shape = positions_BT.flatten(), (*positions_BT.shape, 1, -1)
        cos, sin = self.cos_S1H.index_select(0, flat), self.sin_S1H.index_select(0, flat)
        return cos.view(shape), sin.view(shape)

    def mask_of(self, positions: Tensor, width: int) -> Tensor:
        """Additive mask [..., P] of queries at ``positions`` [...]."""
        hidden = self.columns_S[:width] > positions.unsqueeze(-1)
        return torch.where(hidden, self.hidden, self.visible)
