"""The state of a sweep's jobs: counts, what runs where and how far it is, and what failed.

    python -m sweeps.status runs/depth

The exit code is 0 if all jobs are done or pruned (trials of a search), 1 if some failed, and 2 if
some have not ended.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.shell import Parser, readable_errors
from mtp_lightning.errors import UserError, counted
from mtp_lightning.run.status import PRUNED, STATES, describe_failure, read_status
from sweeps.display import duration, newest
from sweeps.lease import Lease, Leases, look_at
from sweeps.plan import SweepPlan, varied_labels

_LOST = "lost"  # a job whose status is running, but whose process or worker is gone


def describe(plan: SweepPlan, statuses: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The lines that describe a sweep; ``statuses`` has those of its jobs, by folder."""
    leases, newest_leases = look_at(plan.folder)
    labels = varied_labels(plan.jobs)
    running: list[str] = []
    counts = dict.fromkeys((*STATES, PRUNED, _LOST), 0)
    for job in plan.jobs:
        status, lease = statuses[job.folder], newest_leases.get(job.folder)
        state = str(status["state"])
        if state == "running" and leases.lost(plan.folder / job.folder, lease):
            state = _LOST
        counts[state] += 1
        if state in ("running", _LOST):
            step, loss = newest(plan.folder / job.folder)
            total = f" of {job.recipe.max_steps}" if job.recipe and job.recipe.max_steps else ""
            name = " ".join(labels[job.folder]) or job.folder
            loss_text = f", loss {loss}" if loss else ""
            line = f"  {name} on {status['device']}: step {step}{total}{loss_text}"
            running.append(line + _worker(leases, lease))
    summary = ", ".join(f"{n} {state}" for state, n in counts.items() if n)
    yield f"{counted(len(plan.jobs), 'job')}: {summary or 'none'}"
    yield from running
    for job in plan.jobs:
        if statuses[job.folder]["state"] == "failed":
            yield describe_failure(plan.folder / job.folder)


def _status(folder: Path) -> dict[str, Any]:
    """A job's status; the state of a trial that its search has stopped is ``PRUNED``."""
    status = read_status(folder) or {"state": "pending"}
    return {**status, "state": PRUNED} if was_pruned(status) else status


def was_pruned(status: dict[str, Any]) -> bool:
    """Whether a status is that of a trial that its search has stopped."""
    return status["state"] == "interrupted" and str(status["reason"]).startswith(PRUNED)


def _worker(leases: Leases, lease: Lease | None) -> str:
    """Which worker has a job, and its last heartbeat; empty for a job of no worker."""
    if lease is None:
        return ""
    if math.isinf(lease.age):
        return "; free"
    times = f", attempt {lease.number}" if lease.number > 1 else ""
    ago = duration(max(0.0, lease.age))
    return f"; worker {leases.owner(lease)}, last heartbeat {ago} ago{times}"


def main(
    arguments: Sequence[str] | None = None, *, program: str = "python -m sweeps.status"
) -> None:
    parser = Parser.of(__doc__, module="sweeps.status", program=program)
    parser.add_argument("folder", help="folder of a sweep")
    args = parser.parse_args(arguments)
    with readable_errors():
        plan = SweepPlan(Path(args.folder).absolute())
        if not plan.jobs:
            raise UserError(f"{plan.folder} holds no sweep (no sweep.json).")
        statuses = {job.folder: _status(plan.folder / job.folder) for job in plan.jobs}
        print("\n".join(describe(plan, statuses)))
    states = {status["state"] for status in statuses.values()}
    ended = {"done", PRUNED}
    sys.exit(0 if states <= ended else 1 if states <= {*ended, "failed"} else 2)


if __name__ == "__main__":
    main()
