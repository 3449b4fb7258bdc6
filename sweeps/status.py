"""The state of a sweep's jobs: counts, what runs where and how far it is, and what failed.

    python -m sweeps.status runs/depth

The exit code is 0 if all jobs are done, 1 if some failed, and 2 if some have not ended.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.cli import Parser, readable_errors
from mtp_lightning.errors import UserError
from mtp_lightning.run.layout import METRICS_FILE
from mtp_lightning.run.metrics import read_newest
from mtp_lightning.run.status import STATES, describe_failure, read_status
from sweeps.display import duration
from sweeps.lease import Lease, Leases, this_process
from sweeps.plan import Job, Plan, varied_labels

_FREE = "lost"  # a job whose status is running, but whose worker is gone


def describe(folder: Path) -> Iterator[str]:
    """The lines that describe a sweep.

    Args:
        folder: folder of the sweep, absolute.
    """
    plan = Plan(folder)
    leases = Leases(folder, owner=this_process())
    try:
        newest = leases.look()
    finally:
        leases.release_all()
    statuses = {job.folder: read_status(folder / job.folder) for job in plan.jobs}
    labels = varied_labels(plan.jobs)
    running: list[str] = []
    counts = dict.fromkeys((*STATES, _FREE), 0)
    for job in plan.jobs:
        status = statuses[job.folder] or {"state": "pending"}
        lease = newest.get(job.folder)
        state = str(status["state"])
        if state == "running" and lease is not None and leases.free(lease):
            state = _FREE
        counts[state] += 1
        if state in ("running", _FREE):
            owner = "" if lease is None else leases.owner(lease)
            running.append(_running(plan, job, labels[job.folder], status, lease, owner))
    told = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    yield f"{len(plan.jobs)} jobs: {told or 'none'}"
    yield from running
    for job in plan.jobs:
        if (statuses[job.folder] or {}).get("state") == "failed":
            yield describe_failure(folder / job.folder)


def _running(
    plan: Plan,
    job: Job,
    labels: Sequence[str],
    status: dict[str, Any],
    lease: Lease | None,
    owner: str,
) -> str:
    newest = read_newest(plan.folder / job.folder / METRICS_FILE, "train/loss")
    step, loss = newest or (0, math.nan)
    recipe = plan.recipes.get(job.folder)
    of = f" of {recipe.max_steps}" if recipe is not None else ""
    shown = "" if math.isnan(loss) else f", loss {loss:.3f}"
    line = f"  {' '.join(labels) or job.folder} on {status['device']}: step {step}{of}{shown}"
    if lease is None:
        return line
    if math.isinf(lease.age):
        return f"{line}; free"
    times = f", take {lease.number}" if lease.number > 1 else ""
    return f"{line}; worker {owner}, heard of {duration(max(0.0, lease.age))} ago{times}"


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m sweeps.status"
) -> None:
    """The command line."""
    assert __doc__ is not None
    parser = Parser(prog=program, description=__doc__.replace("python -m sweeps.status", program))
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="folder of a sweep")
    args = parser.parse_args(arguments)
    with readable_errors():
        folder = Path(args.folder).absolute()
        plan = Plan(folder)
        if not plan.jobs:
            raise UserError(f"{folder} holds no sweep (no sweep.json).")
        print("\n".join(describe(folder)))
        states = {(read_status(folder / job.folder) or {}).get("state") for job in plan.jobs}
    sys.exit(0 if states == {"done"} else 1 if states <= {"done", "failed"} else 2)


if __name__ == "__main__":
    main()
