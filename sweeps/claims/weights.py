"""Writes the final weights of runs, and compares their digests with those of the stored result.

The same config on the same commit, with one thread of the same kind of processor, gives the same
weights to the last bit. So weights that were deleted can be trained again and checked.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from sweeps.claims.claim import Claim
from sweeps.claims.jobs import jobs
from sweeps.claims.observe import Seed


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
        claim: the claim of the runs.
        runs: the folder of runs, absolute.
        to: the output folder; it need not exist.
        seeds: the runs' seeds.
        arms: the runs' arms.
        stored: the runs of the claim's result, by arm and seed.

    Returns:
        One line per run, with its file and whether the result has the same digest, or saying that
        the run keeps no weights; and the number of runs that keep none.

    Raises:
        UserError: an arm does not compose, or the package safetensors is missing.
        OSError: a file cannot be written, for example because the disk is full.
    """
    from mtp_lightning.interop import weights

    lines, gone = [], 0
    for job in jobs(claim, seeds, runs):
        if job.arm not in arms:
            continue
        run, file = runs / job.folder, to / f"{job.arm}_seed-{job.seed}.safetensors"
        digest = weights.write_weights(run, file)
        if digest is None:
            gone += 1
            lines.append(f"{run} keeps no weights: remove it, and it is trained again")
        else:
            known = stored.get(job.arm, {}).get(job.seed)
            lines.append(f"{file}: {_compared(digest, known)}")
    return lines, gone


def _compared(digest: str, known: Seed | None) -> str:
    said = f"weights {digest[:12]}"
    if known is None or known.weights is None:
        return f"{said}; the result has no digest of this run"
    if known.weights == digest:
        return f"{said}, those of the result"
    of = f"{(known.commit or 'unknown')[:8]} on {known.machine or 'an unknown machine'}"
    return f"{said}; the result's are {known.weights[:12]}, made by commit {of}"
