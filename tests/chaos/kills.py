"""Kills and full disks: a job that ends at any moment continues with the same result.

Every job is done once without a fault. Then it is started in another folder, ended by a signal or
by a full disk, examined, in one case of three ended again, and started again by the same command.
Its files must equal those without a fault, to the last bit.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from tests.chaos.cases import Attempt, Case, hold
from tests.chaos.jobs import (
    RUNS,
    Job,
    claims_job,
    export_job,
    store_job,
    sweep_job,
    train_job,
    whole_files,
)
from tests.chaos.processes import Change, Ended, Process, run

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
# The functions that change names in a folder, or sync a file.
OPERATIONS = ("fsync", "replace", "rename", "link", "unlink", "mkdir")
_SEVERAL = {"trainer.devices": 2, "trainer.max_steps": 24}
_IN_PARTS = {"trainer.strategy": "fsdp", "trainer.split_checkpoint_gb": 0}


class Whole:
    """The jobs without a fault, each done at its first use.

    Args:
        folder: for all of them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ended: dict[str, Ended] = {}

    def of(self, job: Job) -> tuple[Path, Ended]:
        """The folder of a job, and how it ended there."""
        folder = self.folder / job.name
        if job.name not in self._ended:
            folder.mkdir(parents=True, exist_ok=True)
            counted = folder / "operations"
            ended = run(
                job.arguments(folder), folder / "log", change=_counting(counted), timeout=600
            )
            hold(ended.code == 0, f"without a fault {job.name} fails: {ended.out[-2000:]}")
            self._ended[job.name] = ended
        return folder, self._ended[job.name]

    def operations(self, job: Job) -> int:
        """How many operations on files its first process does."""
        return int((self.of(job)[0] / "operations").read_text())


def cases(folder: Path) -> list[Case]:
    """All jobs, each in all ways."""
    cache = folder / "cache"
    whole = Whole(folder / "whole")
    runs = {name: train_job(name, cache, settings) for name, settings in RUNS.items()}
    jobs = [
        *runs.values(),
        store_job(cache),
        train_job("ddp", cache, _SEVERAL | {"trainer.strategy": "ddp"}, processes=True),
        train_job("fsdp", cache, _SEVERAL | {"trainer.strategy": "fsdp"}, processes=True),
        train_job("fsdp-parts", cache, _SEVERAL | _IN_PARTS, processes=True),
        sweep_job(cache),
        claims_job(cache),
    ]
    with suppress(ImportError):
        import transformers  # noqa: F401

        sequential = whole.folder / "sequential" / "run"
        jobs.append(export_job(cache, sequential))
    made = []
    for job in jobs:
        ways: dict[str, Attempt] = {
            name: partial(_killed, job, whole, number) for name, number in SIGNALS.items()
        }
        if job.processes:
            anyone = partial(_killed, job, whole, signal.SIGKILL, anyone=True)
            ways["SIGKILL to any process"] = anyone
        else:
            ways["SIGKILL at a file operation"] = partial(_at_operation, job, whole, None)
            ways["no space at a file operation"] = partial(_at_operation, job, whole, errno.ENOSPC)
            if can_mount():
                ways["a full disk"] = partial(_full_disk, job, whole)
        if job.name == "export":
            first = runs["sequential"]
            ways = {name: partial(_after, whole, first, attempt) for name, attempt in ways.items()}
        for way, attempt in ways.items():
            timed = way.split()[0] in SIGNALS and "operation" not in way
            name = f"{job.name}, {way}"
            made.append(Case("kills", name, attempt, several=job.processes, timed=timed))
    for way, number in SIGNALS.items():
        attempt = partial(_killed_next_to_another, store_job(cache), whole, number)
        made.append(Case("kills", f"two stores at once, {way} to one", attempt, timed=True))
    return made


def _after(whole: Whole, first: Job, attempt: Attempt, folder: Path, chance: random.Random) -> str:
    whole.of(first)
    return attempt(folder, chance)


def _killed(
    job: Job,
    whole: Whole,
    number: int,
    folder: Path,
    chance: random.Random,
    *,
    anyone: bool = False,
) -> str:
    """By a signal after a random share of the time that it takes."""
    _, reference = whole.of(job)
    outcomes = []
    for _ in range(2 if chance.random() < 1 / 3 else 1):
        process = Process(job.arguments(folder), folder / "log")
        share = chance.uniform(0.02, 1.0)
        if job.processes:
            process.sleep(share * reference.seconds)
        else:
            process.sleep_busy(share * reference.busy)
        victim = chance.choice(process.members()) if anyone else process.pid
        late = process.ended()
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        ended = process.end(timeout=300)
        outcomes.append("too late" if late else f"at {share:.0%}, code {ended.code}")
        hold(not ended.timed_out, f"it still runs {ended.seconds:.0f} s later")
        if not (late or anyone):
            expected = {0, -number, 128 + number}
            hold(ended.code in expected, f"code {ended.code}: {ended.out[-1500:]}")
        # Python itself prints this if Ctrl-C arrives while it exits.
        output = ended.out.partition("Exception ignored in")[0]
        hold(anyone or "Traceback" not in output or ended.code < 0, ended.out[-3000:])
        process.alone(seconds=20)
        whole_files(folder)
    # A job of several processes continues when one of them is killed, and reports it as failed.
    return _again(job, whole, folder, outcomes, given=job.again if anyone else ())


def _killed_next_to_another(
    job: Job, whole: Whole, number: int, folder: Path, chance: random.Random
) -> str:
    """Two processes do the job with a common cache and one of them is ended: the other must
    continue as if it were alone."""
    kept, reference = whole.of(job)
    (run_dir,) = [part for part in job.arguments(folder) if part.startswith("run_dir=")]
    beside = [part for part in job.arguments(folder) if part != run_dir]
    processes = [
        Process(job.arguments(folder), folder / "log"),
        Process([*beside, f"run_dir={folder / 'other'}"], folder / "other.log"),
    ]
    place, share = chance.randrange(2), chance.uniform(0.02, 1.0)
    victim, other = processes[place], processes[1 - place]
    victim.sleep_busy(share * reference.busy)
    victim.signal(number)
    ended, survived = victim.end(timeout=300), other.end(timeout=300)
    outcomes = [f"at {share:.0%}, code {ended.code}"]
    hold(not ended.timed_out, "what was ended still runs")
    hold(survived.code == 0, f"the other, code {survived.code}: {survived.out[-2500:]}")
    victim.alone(seconds=20)
    whole_files(folder)
    return _again(job, whole, folder, outcomes)


def _at_operation(
    job: Job, whole: Whole, code: int | None, folder: Path, chance: random.Random
) -> str:
    """Killed just before or after its n-th operation on a file, or that operation finds a full
    disk."""
    n = chance.randint(1, whole.operations(job))
    after = chance.random() < 0.5
    change = _ending(n, after) if code is None else refusing(n, code)
    ended = run(job.arguments(folder), folder / "log", change=change)
    outcomes = [f"operation {n}, code {ended.code}"]
    if code is None:
        hold(not ended.timed_out, "it hangs")
        hold(ended.code in (0, -signal.SIGKILL), f"code {ended.code}: {ended.out[-1500:]}")
    else:
        _ended_well_or_full(ended)
    whole_files(folder)
    return _again(job, whole, folder, outcomes)


def _full_disk(job: Job, whole: Whole, folder: Path, chance: random.Random) -> str:
    """On a small disk, which is later enlarged."""
    kept, _ = whole.of(job)
    used = sum(file.stat().st_blocks * 512 for file in kept.rglob("*") if file.is_file())
    room = chance.randint(8, max(9, int(1.3 * used / 1024)))
    disk = folder / "disk"
    with mounted(disk, room):
        ended = run(job.arguments(disk), folder / "log")
        outcomes = [f"{room} of {used // 1024} kB, code {ended.code}"]
        _ended_well_or_full(ended)
        whole_files(disk)
        subprocess.run(["mount", "-o", "remount,size=512m", str(disk)], check=True)
        return _again(job, whole, disk, outcomes, log=folder / "log")


def _ended_well_or_full(ended: Ended) -> None:
    """Hold that it ended well, or with one line about the full disk."""
    ended.require(0, 1)
    if ended.code:
        hold(len(ended.errors) == 1, f"it says {ended.errors}")
        (error,) = ended.errors
        hold("No space left" in error or "the disk is full" in error, f"it says {error}")


def _again(
    job: Job,
    whole: Whole,
    folder: Path,
    outcomes: list[str],
    *,
    log: Path | None = None,
    given: Sequence[str] = (),
) -> str:
    ended = run([*job.arguments(folder), *given], log or folder / "log", timeout=600)
    done = ended.code == 0 or (job.once and "is not empty" in ended.out)
    hold(done, f"{outcomes}; started again it ends with {ended.code}: {ended.out[-2500:]}")
    job.same(folder, whole.of(job)[0])
    return "; ".join(outcomes)


def can_mount() -> bool:
    """Whether this user may mount a disk."""
    if os.geteuid() != 0:
        return False
    with suppress(OSError, subprocess.CalledProcessError):
        import tempfile

        with tempfile.TemporaryDirectory() as folder, mounted(Path(folder) / "disk", 16):
            return True
    return False


@contextmanager
def mounted(folder: Path, kilobytes: int) -> Iterator[None]:
    """A disk of so many kilobytes at a folder."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# Does an operation on a file, given its number, counted from 1, and the call.
Operation = Callable[[int, "partial[Any]"], Any]


def _through(operation: Operation) -> Change:
    """Have every operation on a file of this process go through a function."""

    def change() -> None:
        numbers = itertools.count(1)
        for name in OPERATIONS:
            real = getattr(os, name)

            def wrapped(*args: Any, real: Callable[..., Any] = real, **kwargs: Any) -> Any:
                return operation(next(numbers), partial(real, *args, **kwargs))

            setattr(os, name, wrapped)

    return change


def _counting(file: Path) -> Change:
    def operation(number: int, call: partial[Any]) -> Any:
        if os.getpid() == os.getsid(0):  # not a child of the command
            file.write_text(str(number))
        return call()

    return _through(operation)


def _ending(n: int, after: bool) -> Change:
    def operation(number: int, call: partial[Any]) -> Any:
        if number == n and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return call()
        finally:  # an operation that fails is one as well
            if number == n:
                os.kill(os.getpid(), signal.SIGKILL)

    return _through(operation)


def refusing(n: int, code: int) -> Change:
    """From its n-th operation on a file on, every operation of the process fails.

    Args:
        n: counted from 1.
        code: the system's number of the error.
    """

    def operation(number: int, call: partial[Any]) -> Any:
        # A full disk still lets files be removed.
        if number >= n and call.func.__name__ != "unlink":
            raise OSError(code, os.strerror(code), str(call.args[0]))
        return call()

    return _through(operation)
