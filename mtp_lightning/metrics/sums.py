"""Metrics that are computed from sums over ranks and batches."""

from __future__ import annotations

import torch
from torchmetrics import Metric


class Sums(Metric):
    """A metric whose states are sums. A subclass annotates each of them as a tensor."""

    full_state_update = False

    def add_sums(self, *names: str, shape: int | tuple[int, ...] = (), exact: bool = False) -> None:
        """Add states of zeros, in fp64, or in int64 if ``exact``: integers have the same sum for
        any number of ranks."""
        for name in names:
            zeros = torch.zeros(shape, dtype=torch.int64 if exact else torch.float64)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
