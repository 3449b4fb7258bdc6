"""Follows jobs that a cluster runs, by their status files, and sets the status of jobs that could
not do so themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from mtp_lightning.errors import counted
from mtp_lightning.run.status import read_status, state_of, write_status
from sweeps.display import make_display
from sweeps.interrupts import interrupts
from sweeps.process import Job

_LOOK_SECONDS = 1.0
_LOOKS_A_SECOND = 200  # of status files, which may be on a shared file server


def follow(
    jobs: list[Job],
    *,
    find_ended: Callable[[], dict[Job, str]],
    cancel: Callable[[Iterable[Job]], None],
    grace_seconds: float,
) -> None:
    """Waits until the cluster has ended all jobs.

    Args:
        find_ended: returns the jobs that the cluster no longer has, with its message about each.
        cancel: cancels jobs; running ones may save first, within ``grace_seconds``.

    Raises:
        KeyboardInterrupt: Ctrl-C or SIGTERM; all jobs are over or canceled.
    """
    unfinished = dict.fromkeys(jobs)
    old_statuses = {job: read_status(job.folder) for job in jobs}
    with make_display(len(jobs)) as display, interrupts() as check:

        def look(reason: str | None = None) -> None:
            ended = find_ended()
            for job in list(unfinished):
                status = read_status(job.folder)
                if status.get("state") == "running" and job not in display.running:
                    display.started(job, str(status["device"]))
                # A job that ended normally says so in its status, sooner than the cluster does.
                says_so = status.get("state") in ("done", "failed") and status != old_statuses[job]
                if job in ended or says_so:
                    _judge(job, ended.get(job, ""), interrupted=reason)
                    display.ended(job)
                    del unfinished[job]
            display.refresh()

        try:
            while unfinished:
                look()
                deadline = time.monotonic() + max(_LOOK_SECONDS, len(unfinished) / _LOOKS_A_SECOND)
                while unfinished and time.monotonic() < deadline:
                    check()
                    time.sleep(0.1)
        except KeyboardInterrupt as interrupt:
            reason = str(interrupt)
            display.say(f"canceling {counted(len(unfinished), 'job')}; those that run save first")
            cancel(unfinished)
            deadline = time.monotonic() + grace_seconds
            while unfinished and time.monotonic() < deadline:
                look(reason)
                time.sleep(_LOOK_SECONDS)
            for job in unfinished:
                _judge(job, "did not end in time", interrupted=reason)
            raise


def _judge(job: Job, message: str, *, interrupted: str | None) -> None:
    """Sets the last status of a job that never began, or was killed before it could set it."""
    if state_of(job.folder) in ("done", "failed", "interrupted"):
        return
    old = read_status(job.folder)
    fields = {key: old.get(key) for key in ("device", "pid", "started")}
    state = "failed" if interrupted is None else "interrupted"
    reason = "; ".join(filter(None, (interrupted, message)))
    write_status(job.folder, job.overrides, state, reason=reason, **fields)
