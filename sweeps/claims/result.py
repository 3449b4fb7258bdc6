"""Makes, writes and reads ``results/LABEL.json``: a claim's verdict with all its numbers.

Only code writes these files, from the files of runs. Pages and figures are made from them alone, so
they can be made again after the runs are deleted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mtp_lightning.markdown import plain
from mtp_lightning.run.atomic import write_json
from sweeps.claims.claim import Claim, is_stale
from sweeps.claims.decide import FAILS, HOLDS, UNDECIDED, decide, overall
from sweeps.claims.jobs import branch_step
from sweeps.claims.observe import ArmRun, Arms, observe
from sweeps.claims.preregistration import read_preregistration
from sweeps.claims.reuse import with_stored
from sweeps.plan import read_versioned
from sweeps.report.statistics import survival

VERSION = 1
UNPREDICTED = "predicted: in no commit"  # follows the verdict of a trial

STALE, NOT_RUN = "stale", "not run"
_ORDER = (HOLDS, FAILS, UNDECIDED, STALE, NOT_RUN)

Result = dict[str, Any]


def judge(claim: Claim, runs: Path, results: Path | None = None) -> Result | None:
    """Make a claim's result from its runs, and from finished runs of the earlier results in a
    folder; None if none was started.

    Raises:
        UserError: the claim was changed after its runs began.
    """
    preregistration = read_preregistration(claim, runs)
    if preregistration is None:
        return None
    preregistration.require(claim, runs)
    by_label = {} if results is None else read_results(results)
    arms = with_stored(observe(claim, runs, preregistration.runs), claim, by_label)
    began = preregistration.beginning(claim, by_label.get(claim.label))
    return make_result(claim, arms, began)


def make_result(claim: Claim, arms: Arms, began: tuple[str, str | None]) -> Result:
    """A claim's result as plain data; ``began`` has the time of its first run's request, and the
    prediction's commit at that time."""
    findings = decide(claim, arms)
    verdict = overall([finding.verdict for finding in findings])
    runs = [
        with_own_costs(claim, arm, run) for arm, seeds in arms.items() for run in seeds.values()
    ]
    ended = sorted(run.ended for run in runs if run.done and run.ended)
    return {
        "version": VERSION,
        "claim": claim.name,
        "setting": claim.setting,
        "sentence": claim.sentence,
        "source": claim.source,
        "command": claim.command if began[1] else f"{claim.command} --unpredicted",
        "digest": claim.digest,
        "predicted_in": began[1],
        "began": began[0],
        "verdict": verdict if began[1] else f"{verdict} ({UNPREDICTED})",
        "unfinished": unfinished(claim, arms),
        "predictions": [
            {**flat.pop("prediction"), **flat} for flat in (asdict(finding) for finding in findings)
        ],
        "arms": {
            arm: {
                "overrides": list(claim.overrides(arm)),
                "time_to_solve": _times(claim, seeds.values()),
                "seeds": {str(seed): asdict(run) for seed, run in seeds.items()},
            }
            for arm, seeds in arms.items()
        },
        "date": ended[-1][:10] if ended else None,
        "minutes": round(sum(run.minutes for run in runs), 1),
        "machines": sorted({run.machine for run in runs if run.machine}),
        "commits": sorted({run.commit for run in runs if run.commit}),
    }


def state(claim: Claim, result: Result | None) -> str:
    """A claim's verdict, or why it has none."""
    if result is None:
        return NOT_RUN
    return STALE if is_stale(result, claim) else plain(result["verdict"])


def in_order(claims: Sequence[Claim], results: Mapping[str, Result]) -> list[Claim]:
    """Sort claims: decided, undecided, stale, not run; each group by name."""

    def place(claim: Claim) -> tuple[int, str]:
        verdict = state(claim, results.get(claim.label))
        return next(i for i, word in enumerate(_ORDER) if verdict.startswith(word)), claim.label

    return sorted(claims, key=place)


def unfinished(claim: Claim, arms: Arms) -> list[str]:
    """The states of unfinished seeds, one line per arm; the verdict leaves these seeds out."""
    lines = []
    for arm in claim.arms:
        states = [run.state for run in arms[arm].values()]
        if others := {state: states.count(state) for state in states if state != "done"}:
            counts = ", ".join(f"{n} {state}" for state, n in others.items())
            lines.append(f"{arm}: {states.count('done')} of {len(states)} seeds done, {counts}")
    return lines


def file_of(label: str, folder: Path) -> Path:
    return folder / f"{label}.json"


def write_result(result: Result, label: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(result, file_of(label, folder))


def read_result(label: str, folder: Path) -> Result | None:
    """Read a claim's result; None if it has none.

    Raises:
        UserError: the file is damaged.
    """
    remedy = "restore it by git checkout, or delete it and judge the claim again"
    return read_versioned(file_of(label, folder), VERSION, dict, remedy=remedy)


def read_results(folder: Path) -> dict[str, Result]:
    """Read all results of a folder, by label; errors as in :func:`read_result`."""
    results = {file.stem: read_result(file.stem, folder) for file in sorted(folder.glob("*.json"))}
    return {label: result for label, result in results.items() if result is not None}


def _times(claim: Claim, runs: Collection[ArmRun]) -> dict[str, Any]:
    """The Kaplan-Meier estimate of the time to solve, for every measure of solving."""
    estimates = {}
    for key in (measure.key for measure in claim.measures if measure.solved is not None):
        curve = survival([run.waits[key] for run in runs if key in run.waits])
        if curve is not None:
            estimates[key] = {
                "median_steps": curve.median,
                "solved": curve.ended,
                "seeds": curve.n,
                "times": list(curve.times),
                "waiting": list(curve.shares),
                "censored": list(curve.censored),
            }
    return estimates


def with_own_costs(claim: Claim, arm: str, run: ArmRun) -> ArmRun:
    """A run with the FLOPs and seconds of its own steps; those of a branch count its parent's."""
    first_step, steps = branch_step(claim.overrides(arm)), run.costs.get("step")
    if first_step is None or not run.done or not steps:
        return run
    share = 1 - first_step / steps
    own_costs = {k: v * share for k, v in run.costs.items() if k in ("flops", "seconds")}
    return replace(run, costs=run.costs | own_costs)
