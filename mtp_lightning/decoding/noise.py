"""Uniform random numbers in [0, 1), from one generator per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """The random numbers of a batch whose rows come and go. A row's numbers depend only on its
    seed, its index and the rounds since it joined.

    Args:
        per_round: numbers that a row takes per round.
        device: device of the returned tensors.
    """

    def __init__(self, per_round: int, device: torch.device | str) -> None:
        self._per_round, self._device = per_round, device
        self._generators: list[torch.Generator] = []

    def join(self, streams: Sequence[tuple[int, int]]) -> Tensor:
        """Append rows, by seed and index; returns their numbers of a first round."""
        for seed, index in streams:
            # Spread out, so that no two small pairs (seed, index) share a stream. The generator
            # takes a seed of 32 bits.
            number = (seed * 1_000_003 + index * 2_654_435_761) % 2**32
            self._generators.append(torch.Generator().manual_seed(number))
        return self._draw(self._generators[len(self._generators) - len(streams) :])

    def next(self) -> Tensor:
        """The numbers of every row for the next round, [B, per_round] fp64."""
        return self._draw(self._generators)

    def _draw(self, generators: Sequence[torch.Generator]) -> Tensor:
        rows = [torch.rand(self._per_round, generator=g, dtype=torch.float64) for g in generators]
        return torch.stack(rows).to(self._device)

    def drop_row(self, row: int) -> None:
        """Drop a row; the last row moves to its slot."""
        self._generators[row] = self._generators[-1]
        self._generators.pop()
