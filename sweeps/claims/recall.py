"""Runs that are gone, of this machine or another: their numbers are in the committed result.

A seed that a result has as done is not run again, and a verdict counts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from sweeps.claims.claim import Claim
from sweeps.claims.jobs import ClaimJob, jobs
from sweeps.claims.observe import Arms, Seed
from sweeps.claims.register import Register


def stored_seeds(claim: Claim, stored: Mapping[str, Any] | None) -> dict[str, dict[int, Seed]]:
    """By arm, the runs of a stored result; none of a result of another prediction.

    Args:
        claim: as it is now.
        stored: its ``results/LABEL.json``; None where there is none.
    """
    if stored is None or stored["digest"] != claim.digest:
        return {}
    return {
        arm: {int(seed): _seed(run) for seed, run in of["seeds"].items()}
        for arm, of in stored["arms"].items()
    }


def left_to_run(
    claim: Claim, seeds: Sequence[int], runs: Path, stored: Mapping[str, Any] | None
) -> list[ClaimJob]:
    """A claim's jobs at some seeds, but for those that its stored result has as done.

    Args:
        claim: as it is now.
        seeds: in the order wanted.
        runs: the folder of all runs, absolute.
        stored: its result.

    Raises:
        UserError: an arm does not compose, or has another config than its stored runs had.
    """
    known = {
        arm: {number: seed for number, seed in of.items() if seed.done}
        for arm, of in stored_seeds(claim, stored).items()
    }
    left = []
    for job in jobs(claim, list(dict.fromkeys([*seeds, *chain(*known.values())])), runs):
        done = known.get(job.arm, {}).get(job.seed)
        if done is not None and done.folder != job.folder:
            raise UserError(
                f"{claim.label} has a result of {job.arm} at seed {job.seed}, {done.folder}, and "
                f"its config is now that of {job.folder}: go on from the commit {done.commit} that "
                f"it was made from, or move results/{claim.label}.json away and run all of it anew."
            )
        if done is None and job.seed in seeds:
            left.append(job)
    return left


def with_stored(arms: Arms, claim: Claim, stored: Mapping[str, Any] | None) -> Arms:
    """What was observed here, and of a stored result what was started elsewhere alone, or is done
    there and not here."""
    both = {arm: dict(seeds) for arm, seeds in arms.items()}
    for arm, seeds in stored_seeds(claim, stored).items():
        for number, seed in seeds.items():
            here = both.setdefault(arm, {}).get(number)
            if here is None or here.state == "missing" or (seed.done and not here.done):
                both[arm][number] = seed
    return {arm: dict(sorted(seeds.items())) for arm, seeds in both.items()}


def beginning(
    register: Register | None, claim: Claim, stored: Mapping[str, Any] | None
) -> tuple[str, str | None]:
    """When a claim's first run was asked for, here or before, and the commit that had it then."""
    began = [] if register is None else [(register.began, register.commit)]
    if stored is not None and stored["digest"] == claim.digest:
        began.append((stored["began"], stored["predicted_in"]))
    return min(began, key=lambda pair: pair[0])


def _seed(run: Mapping[str, Any]) -> Seed:
    waits = {name: (float(at), bool(solved)) for name, (at, solved) in run["waits"].items()}
    curve = [(float(x), float(y)) for x, y in run["curve"]]
    return Seed(**{**run, "waits": waits, "curve": curve})
