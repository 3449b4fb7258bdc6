"""The final weights of a run: their digest, and a file with them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mtp_lightning.interop import tensor_files
from mtp_lightning.run.checkpoints import intact
from mtp_lightning.run.layout import CHECKPOINTS, LAST
from mtp_lightning.run.loading import model_weights, read_checkpoint


def last_weights(run: Path) -> dict[str, Tensor] | None:
    """The final weights, by the model's own names; None if they are not kept.

    Args:
        run: the run's folder.
    """
    file = run / CHECKPOINTS / LAST
    if not file.is_file() or not intact(file):
        return None
    _, checkpoint = read_checkpoint(file, needs=("state_dict",))
    return {name: tensor.contiguous() for name, tensor in model_weights(checkpoint).items()}


def digest_of(run: Path) -> str | None:
    """SHA-256 of the names, types, shapes and numbers of :func:`last_weights`."""
    weights = last_weights(run)
    return None if weights is None else _digest(weights)


def write_weights(run: Path, file: Path) -> str | None:
    """Writes :func:`last_weights` as safetensors; returns their digest, or None without weights.

    Raises:
        UserError: if the package safetensors is missing.
        OSError: for a full disk, among others.
    """
    weights = last_weights(run)
    if weights is None:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    tensor_files.write(file, weights, {"run": run.name})
    return _digest(weights)


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
