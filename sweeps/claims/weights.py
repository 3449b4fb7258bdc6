"""The final weights of runs, their digests, and their files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mtp_lightning.run.layout import CHECKPOINTS, LAST
from sweeps.claims.claim import Claim
from sweeps.claims.jobs import jobs

if TYPE_CHECKING:
    from torch import Tensor

    from sweeps.claims.observe import ArmRun


def last_weights(run: Path) -> dict[str, Tensor] | None:
    """The final weights in a run's folder, by the model's own names; None if they are not kept."""
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

    sha256 = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha256.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha256.hexdigest()


def write_weights(
    claim: Claim,
    runs: Path,
    to: Path,
    *,
    seeds: Sequence[int],
    arms: Collection[str],
    stored: Mapping[str, Mapping[int, ArmRun]],
) -> tuple[list[str], int]:
    """Write ``ARM_seed-S.safetensors`` of finished runs to a folder, and compare their digests with
    those of the runs in the stored result. The same config on the same commit, with one thread of
    the same kind of processor, gives the same weights to the last bit.

    Returns:
        One line per run, with its file and whether the result has the same digest, or saying that
        the run keeps no weights; and the number of runs that keep none.

    Raises:
        UserError: an arm does not compose.
        OSError: a file cannot be written, for example because the disk is full.
    """
    from safetensors.torch import save_file

    lines, n_missing = [], 0
    for job in jobs(claim, seeds, runs):
        if job.arm not in arms:
            continue
        run, file = job.folder, to / f"{job.arm}_seed-{job.seed}.safetensors"
        weights = last_weights(run)
        if weights is None:
            n_missing += 1
            lines.append(f"{run} has no weights left: delete the folder to train it again")
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            # Copies, since the library refuses tensors that share memory, as tied ones do.
            copies = {name: tensor.clone() for name, tensor in weights.items()}
            save_file(copies, file, {"run": run.name})
            stored_run = stored.get(job.arm, {}).get(job.seed)
            lines.append(f"{file}: {_compared(digest_of(weights), stored_run)}")
    return lines, n_missing


def _compared(digest: str, stored: ArmRun | None) -> str:
    text = f"weights {digest[:12]}"
    if stored is None or stored.weights is None:
        return f"{text}; the result has no digest of this run"
    if stored.weights == digest:
        return f"{text}, those of the result"
    origin = f"{(stored.commit or 'unknown')[:8]} on {stored.machine or 'an unknown machine'}"
    return f"{text}; the result's are {stored.weights[:12]}, made by commit {origin}"
