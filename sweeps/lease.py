"""Leases decide which worker has which job, by files in the sweep's folder alone.

``.leases/JOB.N`` is created exclusively (O_EXCL), so only one of all workers on all machines gets
it. Its owner touches it every few seconds. A lease that nobody has touched for some minutes is
stale; a worker takes the job over by creating ``JOB.N+1``, which only one worker can do. No file is
ever removed, so no worker can remove one that another has just made. An owner that was only asleep
finds the next number, and gives the job up.

All times are set by the file server (the current one by touching a file), so the machines' clocks
need not agree.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from mtp_lightning.stored import read_json
from sweeps.process import is_gone

FOLDER = ".leases"
STALE_SECONDS = 120.0
_BEATS = 8  # per time after which a lease is stale


@dataclass(frozen=True)
class Lease:
    """The newest lease of a job."""

    job: str  # the name of its folder
    number: int  # how many workers have had it, this one included
    age: float  # seconds since it was touched; infinite when its owner has released it


class Leases:
    """The leases of a sweep, as one worker sees and takes them. Threads may share it.

    Args:
        folder: the sweep's folder.
        owner: this worker's name, which no other worker has.
        stale_seconds: seconds after which a lease that nobody touches is free.
    """

    def __init__(self, folder: Path, *, owner: str, stale_seconds: float = STALE_SECONDS) -> None:
        self._folder = folder / FOLDER
        self._clock = self._folder / f"clock-{owner}"
        self._owner = owner
        self._stale = stale_seconds
        self.beat_seconds = stale_seconds / _BEATS  # between two heartbeats, and two looks
        self._held: dict[str, int] = {}
        self._lock = Lock()

    @property
    def held(self) -> list[str]:
        """The jobs that this worker has."""
        with self._lock:
            return list(self._held)

    def look(self) -> dict[str, Lease]:
        """The newest lease of every job that ever had one."""
        newest: dict[str, int] = {}
        for name in os.listdir(self._folder) if self._folder.is_dir() else ():
            job, dot, digits = name.rpartition(".")
            if dot and digits.isdecimal():
                newest[job] = max(newest.get(job, 0), int(digits))
        leases = {}
        now = self._now() if newest else 0.0
        for job, number in newest.items():
            file = self._folder / f"{job}.{number}"
            with suppress(OSError):
                touched = file.stat().st_mtime
                age = float("inf") if touched == 0 else now - touched
                leases[job] = Lease(job, number, age)
        return leases

    def owner(self, lease: Lease) -> str:
        """The name of the worker that has the job; empty while its lease is being written."""
        try:
            return str(read_json(self._folder / f"{lease.job}.{lease.number}")["owner"])
        except (OSError, ValueError, KeyError, TypeError):
            return ""

    def free(self, lease: Lease | None) -> bool:
        """Whether a job with this lease may be taken."""
        return lease is None or lease.age > self._stale

    def lost(self, folder: Path, lease: Lease | None) -> bool:
        """Whether a job whose status is running has no process any more."""
        return is_gone(folder) if lease is None else self.free(lease)

    def take(self, job: str, lease: Lease | None) -> bool:
        """Try to take a job whose lease is free, or that has none; another worker may be faster."""
        number = 1 if lease is None else lease.number + 1
        self._folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        try:
            descriptor = os.open(self._folder / f"{job}.{number}", flags, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump({"owner": self._owner}, file)
        with self._lock:
            self._held[job] = number
        return True

    def beat(self) -> None:
        """Touches all leases of this worker, and drops those that others have taken over."""
        with self._lock:
            for job, number in list(self._held.items()):
                with suppress(OSError):  # a file server that is away for a moment
                    if (self._folder / f"{job}.{number + 1}").exists():
                        del self._held[job]
                    else:
                        os.utime(self._folder / f"{job}.{number}")

    def release(self, job: str) -> None:
        """Releases a job, if it is this worker's, so that others need not wait."""
        with self._lock:
            number = self._held.pop(job, None)
            if number is not None:
                with suppress(OSError):
                    os.utime(self._folder / f"{job}.{number}", (0, 0))

    def release_all(self) -> None:
        for job in self.held:
            self.release(job)
        with suppress(OSError):
            self._clock.unlink()

    def _now(self) -> float:
        """The current time by the file server's clock, which also sets the leases' times."""
        try:
            self._clock.touch()
            return self._clock.stat().st_mtime
        except OSError:  # this process may only read the folder
            return time.time()


def look_at(folder: Path) -> tuple[Leases, dict[str, Lease]]:
    """The leases of a sweep for an observer, and each job's newest lease."""
    leases = Leases(folder, owner=this_process())
    try:
        return leases, leases.look()
    finally:
        leases.release_all()  # removes the file that gave the time


def live(folder: Path) -> list[Lease]:
    """The leases of a sweep whose workers are at work."""
    leases, newest = look_at(folder)
    return [lease for lease in newest.values() if not leases.free(lease)]


def this_process() -> str:
    """A name that no other process has, on any machine."""
    return f"{os.uname().nodename}-{os.getpid()}"
