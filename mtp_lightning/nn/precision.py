"""Autocast, on devices that have it and on those that do not (``meta``)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype for products with ``x``: autocast's if it is on, else its own."""
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Turn autocast off on the device of ``x``."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)  # type: ignore[return-value]
