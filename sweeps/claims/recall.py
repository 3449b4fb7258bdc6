"""Recalls finished runs from the committed results, where their folders are gone or elsewhere.

A seed that is done in a result counts in a verdict and is not run again. The same holds for a run
of another claim with the same config, since a run's folder is named by its config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mtp_lightning.errors import UserError
from sweeps.claims.claim import Claim, ClaimMeasure
from sweeps.claims.jobs import ClaimJob, jobs
from sweeps.claims.observe import Arms, Seed, key
from sweeps.claims.preregistration import Preregistration
from sweeps.report.statistics import Wait


def stored_seeds(claim: Claim, stored: Mapping[str, Any] | None) -> dict[str, dict[int, Seed]]:
    """The runs of a stored result by arm and seed; empty if the result is of another prediction."""
    if stored is None or stored["digest"] != claim.digest:
        return {}
    return {arm: seeds_of(content) for arm, content in stored["arms"].items()}


def seeds_of(content: Mapping[str, Any]) -> dict[int, Seed]:
    """The runs of an arm of a stored result, by seed."""
    return {int(seed): _seed(run) for seed, run in content["seeds"].items()}


def measure_of(entry: Mapping[str, Any]) -> ClaimMeasure:
    """The measure of a prediction of a stored result."""
    own = tuple((arm, tuple(curve)) for arm, curve in entry.get("own_curves", ()))
    return ClaimMeasure(**{**entry, "curve": tuple(entry.get("curve", ())), "own_curves": own})


def shared_seeds(claim: Claim, results: Iterable[Mapping[str, Any]]) -> dict[str, Seed]:
    """The done runs of all claims that measured at least what this one measures, by folder."""
    wanted, names = set(claim.measures), {key(measure) for measure in claim.measures}
    found = {}
    for result in results:
        measured = {measure_of(entry["measure"]).of_run for entry in result["predictions"]}
        for seed in (seed for of in result["arms"].values() for seed in seeds_of(of).values()):
            if seed.done and wanted <= measured and (seed.curve or claim.equal != "flops"):
                values = {name: seed.values[name] for name in names & seed.values.keys()}
                waits = {name: seed.waits[name] for name in names & seed.waits.keys()}
                found[seed.folder] = replace(seed, values=values, waits=waits)
    return found


def left_to_run(
    claim: Claim, seeds: Sequence[int], runs: Path, stored: Mapping[str, Any] | None
) -> list[ClaimJob]:
    """A claim's jobs at some seeds, without those that are done in its stored result.

    Raises:
        UserError: an arm does not compose, or its config differs from that of its stored runs.
    """
    known = {
        (arm, number): seed
        for arm, of in stored_seeds(claim, stored).items()
        for number, seed in of.items()
        if seed.done
    }
    if all((arm, number) in known for arm in claim.arms for number in seeds):
        return []
    left = []
    for job in jobs(claim, list(dict.fromkeys([*seeds, *(n for _, n in known)])), runs):
        done = known.get((job.arm, job.seed))
        if done is not None and done.folder != job.name:
            raise UserError(
                f"{claim.label} was run with another config: the settings of {job.arm} have "
                f"changed since commit {done.commit}. Check out that commit to continue, or run "
                f"the claim again: {claim.typed('replicate')}."
            )
        if done is None and job.seed in seeds:
            left.append(job)
    return left


def with_stored(arms: Arms, claim: Claim, results: Mapping[str, Mapping[str, Any]]) -> Arms:
    """Add runs of the claim's result, and of other claims (:func:`shared_seeds`), to the observed
    ones: those that were only started elsewhere, and those that are done there and not here.

    Args:
        results: all claims' results, by label.

    Raises:
        UserError: a stored run has another config here.
    """
    both = {arm: dict(seeds) for arm, seeds in arms.items()}
    for arm, seeds in stored_seeds(claim, results.get(claim.label)).items():
        for number, seed in seeds.items():
            here = both.setdefault(arm, {}).get(number)
            if here is None or here.state == "missing" or (seed.done and not here.done):
                both[arm][number] = seed
            elif seed.done and here.folder != seed.folder:
                raise UserError(
                    f"{claim.label} has a result of {arm} at seed {number}, {seed.folder}, and "
                    f"the folder of runs has another config for it, {here.folder}: give --runs the "
                    "folder of the result's runs, or compare the two by "
                    f"{claim.typed('replicate')}."
                )
            elif here.weights is None:  # the run's weights may be deleted, and the rest not
                both[arm][number] = replace(here, weights=seed.weights)
    shared = shared_seeds(claim, results.values())
    for seeds in both.values():
        for number, seed in seeds.items():
            if not seed.done:
                seeds[number] = shared.get(seed.folder, seed)
    return {arm: dict(sorted(seeds.items())) for arm, seeds in both.items()}


def beginning(
    preregistration: Preregistration, claim: Claim, stored: Mapping[str, Any] | None
) -> tuple[str, str | None]:
    """When a claim's first run was asked for, here or elsewhere, and its commit then."""
    began = [(preregistration.began, preregistration.commit)]
    if stored is not None and stored["digest"] == claim.digest:
        began.append((stored["began"], stored["predicted_in"]))
    return min(began, key=lambda pair: pair[0])


def _seed(run: Mapping[str, Any]) -> Seed:
    waits = {name: Wait(float(at), bool(solved)) for name, (at, solved) in run["waits"].items()}
    # Older results have no curves.
    curve = [(float(x), float(y)) for x, y in run.get("curve", [])]
    return Seed(**{**run, "waits": waits, "curve": curve})
