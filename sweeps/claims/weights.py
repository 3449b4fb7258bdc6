"""The final weights of a run, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.run.layout import CHECKPOINTS, LAST

if TYPE_CHECKING:
    from torch import Tensor


def last_weights(run: Path) -> dict[str, Tensor] | None:
    """The final weights, by the model's own names; None if they are not kept.

    Args:
        run: the run's folder.
    """
    from mtp_lightning.run.checkpoints import intact
    from mtp_lightning.run.loading import model_weights, read_checkpoint

    file = run / CHECKPOINTS / LAST
    if not file.is_file() or not intact(file):
        return None
    _, checkpoint = read_checkpoint(file, needs=("state_dict",))
    return {name: tensor.contiguous() for name, tensor in model_weights(checkpoint).items()}


def digest_of(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and numbers of weights."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
