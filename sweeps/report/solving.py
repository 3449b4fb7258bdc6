"""What it is to solve a task: a seed's exact match is above a level.

It is a matter of all or nothing for each seed, so the share of seeds that solve says more than the
mean over them does, and the time to solve is a curve of survival.
"""

from __future__ import annotations

import math

from mtp_lightning.run.solved import first_above
from sweeps.report.metrics import EXACT
from sweeps.report.read import Run
from sweeps.report.settings import Setting
from sweeps.report.shares import Share, share
from sweeps.report.survival import Survival, Wait, survival


def solved_share(setting: Setting, level: float) -> Share | None:
    """Finished seeds whose final ``val/exact_match`` is above the level; None where one of them
    has no number, since nobody knows whether it solves."""
    found = setting.estimate(EXACT)
    if found.interval is None:
        return None
    return share(sum(value > level for value in found.values.values()), len(found.values))


def wait_of(run: Run, level: float, tag: str = EXACT) -> Wait | None:
    """Optimizer steps to a run's first validation above the level, whatever came after it; to the
    last one, if there was none such yet. None without a validation."""
    solved = first_above(run.rows, level, tag)
    if solved is not None:
        return Wait(solved["step"], True)
    steps = [row["step"] for row in run.rows if math.isfinite(row.get(tag, math.nan))]
    return Wait(max(steps), False) if steps else None


def time_to_solve(setting: Setting, level: float) -> Survival | None:
    """Over all seeds that have validated, running and failed ones too; None without such."""
    waits = (wait_of(run, level) for run in setting.runs)
    return survival([wait for wait in waits if wait])
