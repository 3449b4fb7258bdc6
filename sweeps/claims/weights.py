"""Writes the final weights of runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sweeps.claims.claim import Claim
from sweeps.claims.jobs import jobs
from sweeps.claims.observe import ArmRun, digest_of, last_weights


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
