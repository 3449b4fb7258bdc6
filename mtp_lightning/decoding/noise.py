"""Uniform random numbers in [0, 1), from one generator per row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Noise:
    """The random numbers of a batch whose rows come and go.

    A row's numbers depend on its seed, its index and the number of rounds since it joined, and not
    on the other rows of the batch.

    Args:
        slots: most rows at a time.
        per_round: numbers that a row takes per round.
        device: device of the returned tensors.
    """

    _ROUNDS = 64  # rounds whose numbers are drawn at a time

    def __init__(self, slots: int, per_round: int, device: torch.device | str) -> None:
        self._generators: list[torch.Generator] = []
        shape = (slots, self._ROUNDS, per_round)
        self._block = torch.empty(shape, dtype=torch.float64, device=device)
        self._round = self._ROUNDS

    def join(self, streams: Sequence[tuple[int, int]]) -> Tensor:
        """Append rows to the batch.

        Args:
            streams: seed and index of every new row.

        Returns:
            The numbers of their first round, [new rows, per_round].
        """
        first = []
        for seed, index in streams:
            # Spread out, so that no two small pairs (seed, index) share a stream. The generator
            # takes a seed of 32 bits.
            number = (seed * 1_000_003 + index * 2_654_435_761) % 2**32
            generator = torch.Generator().manual_seed(number)
            first.append(self._draw(generator, 1)[0])
            left = self._draw(generator, self._ROUNDS - self._round)
            self._block[len(self._generators), self._round :] = left
            self._generators.append(generator)
        return torch.stack(first).to(self._block.device)

    def next(self) -> Tensor:
        """The numbers of every row for the next round, [B, per_round] fp64."""
        batch = len(self._generators)
        if self._round == self._ROUNDS:
            rows = [self._draw(generator, self._ROUNDS) for generator in self._generators]
            self._block[:batch] = torch.stack(rows)
            self._round = 0
        self._round += 1
        return self._block[:batch, self._round - 1]

    def _draw(self, generator: torch.Generator, rounds: int) -> Tensor:
        shape = (rounds, self._block.shape[2])
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    def drop_row(self, row: int) -> None:
        """Drop a row; the last row moves to its slot."""
        last = len(self._generators) - 1
        self._generators[row] = self._generators[last]
        self._generators.pop()
        self._block[row, self._round :] = self._block[last, self._round :]
