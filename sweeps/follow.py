"""Follows jobs that a cluster runs, by their status files, and sets the status of jobs that could
not do so themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mtp_lightning.run.status import read_status, state_of, write_status
from sweeps.display import make_display
from sweeps.interrupts import interrupts
from sweeps.process import Job

_LOOK_SECONDS = 1.0
_LOOKS_A_SECOND = 200  # of status files, which may be on a shared file server


def follow(
    jobs: list[Job],
    *,
    over: Callable[[], dict[Job, str]],
    cancel: Callable[[Iterable[Job]], None],
    grace_seconds: float,
) -> None:
    """Waits until the cluster has ended all jobs.

    Args:
        over: returns the jobs that the cluster no longer has, with its message about each.
        cancel: cancels jobs; running ones may save first.
        grace_seconds: seconds that canceled jobs may take.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; all jobs are over or canceled.
    """
    left, running = list(jobs), set()
    before = {job: read_status(job.folder) for job in jobs}
    with make_display(len(jobs)) as display, interrupts() as check:

        def look(reason: str | None = None) -> None:
            ended, gone = over(), set()
            for job in list(left):
                status = read_status(job.folder) or {}
                if status.get("state") == "running" and job not in running:
                    running.add(job)
                    display.started(job, str(status["device"]))
                # A job that ended normally says so in its status, sooner than the cluster does.
                over_itself = status.get("state") in ("done", "failed") and status != before[job]
                if job in ended or over_itself:
                    _judge(job, ended.get(job, ""), interrupted=reason)
                    display.ended(job)
                    gone.add(job)
            left[:] = [job for job in left if job not in gone]
            display.refresh()

        try:
            while left:
                look()
                until = time.monotonic() + max(_LOOK_SECONDS, len(left) / _LOOKS_A_SECOND)
                while left and time.monotonic() < until:
                    check()
                    time.sleep(0.1)
        except KeyboardInterrupt as interrupt:
            reason = str(interrupt)
            display.say(f"canceling {len(left)} jobs; those that run save first")
            cancel(left)
            until = time.monotonic() + grace_seconds
            while left and time.monotonic() < until:
                look(reason)
                time.sleep(_LOOK_SECONDS)
            for job in left:
                _judge(job, "did not end in time", interrupted=reason)
            raise


def _judge(job: Job, said: str, *, interrupted: str | None) -> None:
    """Sets the last status of a job that never began, or was killed before it could set it."""
    if state_of(job.folder) in ("done", "failed", "interrupted"):
        return
    old = read_status(job.folder) or {}
    kept = {key: old.get(key) for key in ("device", "pid", "started")}
    state = "failed" if interrupted is None else "interrupted"
    reason = "; ".join(filter(None, (interrupted, said)))
    write_status(job.folder, job.overrides, state, reason=reason, **kept)
