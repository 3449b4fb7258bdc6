"""The data-parallel ranks that train one model together."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def _together() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks; 1 outside of distributed training."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """Index of this rank, from 0."""
    return dist.get_rank() if _together() else 0


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of all ranks' tensors, the same on all ranks; the argument is not changed."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values
