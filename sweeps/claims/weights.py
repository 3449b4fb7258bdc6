"""The weights that runs ended with, made again where they are gone.

Runs stay where they were made, and go. The same config on the same commit, with one thread of the
same kind of processor, gives the same weights to the last bit; so whoever runs an arm again has
them again, and can tell by the digest that a result keeps.
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
