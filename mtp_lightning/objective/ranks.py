"""The processes that train one model together, each on windows of its own."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """How many there are; 1 outside of distributed training."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if _together() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's tensor, the same on all; the argument keeps its values."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values
