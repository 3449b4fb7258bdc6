"""Reads finished runs from the committed results where their folders are gone or elsewhere.

A seed that is done in a result counts in a verdict and is not run again. The same holds for a run
of another claim with the same config, since a run's folder is named by its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mtp_lightning.errors import UserError
from sweeps.claims.claim import Claim, ClaimMeasure, Stored, is_stale
from sweeps.claims.jobs import ClaimJob, jobs
from sweeps.claims.observe import ArmRun, Arms


def stored_runs(claim: Claim, stored: Stored | None) -> dict[str, dict[int, ArmRun]]:
    """The runs of a stored result by arm and seed; empty if the result is of another prediction."""
    if stored is None or is_stale(stored, claim):
        return {}
    return {arm: runs_of(content) for arm, content in stored["arms"].items()}


def runs_of(content: Stored) -> dict[int, ArmRun]:
    """The runs of an arm of a stored result, by seed."""
    return {int(seed): ArmRun.from_json(run) for seed, run in content["seeds"].items()}


def shared_runs(claim: Claim, results: Iterable[Stored]) -> dict[str, ArmRun]:
    """The done runs of all claims that measured at least what this one measures, by folder."""
    measures, keys = set(claim.measures), {measure.key for measure in claim.measures}
    shared = {}
    for result in results:
        entries = result["predictions"]
        if not measures <= {ClaimMeasure.from_json(entry["measure"]).of_run for entry in entries}:
            continue
        for run in (run for arm in result["arms"].values() for run in runs_of(arm).values()):
            if run.done and (run.curve or claim.equal != "flops"):
                values = {key: run.values[key] for key in keys & run.values.keys()}
                waits = {key: run.waits[key] for key in keys & run.waits.keys()}
                shared[run.folder] = replace(run, values=values, waits=waits)
    return shared


def left_to_run(
    claim: Claim, seeds: Sequence[int], runs: Path, stored: Stored | None
) -> list[ClaimJob]:
    """A claim's jobs at some seeds, without those that are done in its stored result.

    Raises:
        UserError: an arm does not compose, or its config differs from that of its stored runs.
    """
    by_arm = stored_runs(claim, stored).items()
    done = {(arm, s): run for arm, by_seed in by_arm for s, run in by_seed.items() if run.done}
    if all((arm, seed) in done for arm in claim.arms for seed in seeds):
        return []
    missing = []
    for job in jobs(claim, list(dict.fromkeys([*seeds, *(seed for _, seed in done)])), runs):
        old = done.get((job.arm, job.seed))
        if old is not None and old.folder != job.name:
            raise UserError(
                f"{claim.label} was run with another config: the settings of {job.arm} have "
                f"changed since commit {old.commit}. Check out that commit to continue, or run "
                f"the claim again: {claim.typed('replicate')}."
            )
        if old is None and job.seed in seeds:
            missing.append(job)
    return missing


def with_stored(arms: Arms, claim: Claim, results: Mapping[str, Stored]) -> Arms:
    """Add runs of the claim's result, and of other claims (:func:`shared_runs`), to the observed
    ones: those that were only started elsewhere, and those that are done there and not here.
    ``results`` has all claims' results by label.

    Raises:
        UserError: a stored run has another config here.
    """
    merged = {arm: dict(by_seed) for arm, by_seed in arms.items()}
    for arm, by_seed in stored_runs(claim, results.get(claim.label)).items():
        for seed, run in by_seed.items():
            here = merged.setdefault(arm, {}).get(seed)
            if here is None or here.state == "missing" or (run.done and not here.done):
                merged[arm][seed] = run
            elif run.done and here.folder != run.folder:
                raise UserError(
                    f"{claim.label} has a result of {arm} at seed {seed}, {run.folder}, and "
                    f"the folder of runs has another config for it, {here.folder}: give --runs the "
                    "folder of the result's runs, or compare the two by "
                    f"{claim.typed('replicate')}."
                )
            elif here.weights is None:  # the run's weights may be deleted, and the rest not
                merged[arm][seed] = replace(here, weights=run.weights)
    shared = shared_runs(claim, results.values())
    return {
        arm: {s: r if r.done else shared.get(r.folder, r) for s, r in sorted(by_seed.items())}
        for arm, by_seed in merged.items()
    }
