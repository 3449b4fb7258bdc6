"""The weights that a run ended with: their digest, which a result keeps, and files of them.

Runs stay where they were made, and go. The same config on the same commit, with one thread of the
same kind of processor, gives the same weights to the last bit; so whoever runs an arm again has
them again, and can tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtp_lightning.interop import tensor_files
from mtp_lightning.run.checkpoints import intact
from mtp_lightning.run.layout import CHECKPOINTS, LAST
from mtp_lightning.run.loading import model_weights, read_checkpoint
from sweeps.claims.claim import Claim
from sweeps.claims.jobs import jobs

if TYPE_CHECKING:
    from sweeps.claims.observe import Seed


def digest_of(run: Path) -> str | None:
    """SHA-256 of a run's last weights; None where they are not kept.

    Args:
        run: its folder.
    """
    weights = _weights(run)
    return None if weights is None else _digest(weights)


def write_weights(
    claim: Claim,
    runs: Path,
    to: Path,
    *,
    seeds: Sequence[int],
    arms: Collection[str],
    stored: Mapping[str, Mapping[int, Seed]],
) -> tuple[list[str], int]:
    """Write ``ARM_seed-S.safetensors`` of finished runs.

    Args:
        claim: whose runs they are.
        runs: their folder, absolute.
        to: the files' folder; it need not exist.
        seeds: of the runs.
        arms: likewise.
        stored: the runs of the claim's result, by arm and seed.

    Returns:
        A line a run: its file, and whether the result has the same digest, or that nothing of it is
        kept; and of how many runs nothing is.

    Raises:
        UserError: an arm does not compose; the package safetensors is missing.
        OSError: a full disk, among others.
    """
    lines, gone = [], 0
    for job in jobs(claim, seeds, runs):
        if job.arm not in arms:
            continue
        weights = _weights(runs / job.folder)
        if weights is None:
            gone += 1
            lines.append(
                f"{runs / job.folder} keeps no weights: remove it, and it is trained again"
            )
            continue
        to.mkdir(parents=True, exist_ok=True)
        file = to / f"{job.arm}_seed-{job.seed}.safetensors"
        tensor_files.write(file, weights, {"run": job.folder})
        known = stored.get(job.arm, {}).get(job.seed)
        lines.append(f"{file}: {_compared(_digest(weights), known)}")
    return lines, gone


def _compared(digest: str, known: Seed | None) -> str:
    said = f"weights {digest[:12]}"
    if known is None or known.weights is None:
        return f"{said}; the result has no digest of this run"
    if known.weights == digest:
        return f"{said}, those of the result"
    of = f"{(known.commit or 'unknown')[:8]} on {known.machine or 'an unknown machine'}"
    return f"{said}; the result's are {known.weights[:12]}, made by commit {of}"


def _weights(run: Path) -> dict[str, Tensor] | None:
    file = run / CHECKPOINTS / LAST
    if not file.is_file() or not intact(file):
        return None
    _, checkpoint = read_checkpoint(file, needs=("state_dict",))
    return {name: tensor.contiguous() for name, tensor in model_weights(checkpoint).items()}


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and numbers."""
    found = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
