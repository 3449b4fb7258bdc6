"""One process builds a folder of the cache; the others that need it, on any machine, wait for it.

The builder makes the folder ``.NAME.building-N``, which only one process can make, and touches it
every few seconds. The others wait until the finished folder is there. If the builder was killed,
the next one makes ``N + 1``. Processes on the same machine see this at once, by the system's lock
on the folder, which ends with the builder. Processes on other machines, and all processes where
there are no locks, see it when the folder has not been touched for two minutes.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

BEAT = 15.0  # seconds between two signs of life
SILENCE = 8 * BEAT  # seconds without one after which another process builds
# File in a builder's folder that names the machine, on which the lock can be tested. It is removed
# before the lock ends.
_MACHINE = ".machine"


def folder_to_build(target: Path) -> Path | None:
    """Makes a folder next to ``target`` to build it in, after waiting for a process that builds it
    already; returns None if that process has built it. Once the caller has been silent for long,
    another process may remove the folder and make one of the same name."""
    watched: tuple[int, float] | None = None
    since, delay, has_warned = time.monotonic(), 0.02, False
    while not target.is_dir():
        number = _newest(target)
        newest = _folder(target, number)
        try:
            touched = newest.stat().st_mtime if number else 0.0
        except FileNotFoundError:  # renamed to the target, or removed
            continue
        if (number, touched) != watched:
            watched, since = (number, touched), time.monotonic()
        killed = number > 0 and _was_killed(newest)
        if number == 0 or killed or time.monotonic() - since > SILENCE:
            folder = _folder(target, number + 1)
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                continue
            if target.is_dir():  # the previous builder has just finished
                with suppress(FileNotFoundError):  # it may have removed this folder, too
                    folder.rmdir()
                break
            if killed:
                shutil.rmtree(newest, ignore_errors=True)
            return folder
        if not has_warned:
            log.warning("another process builds %s: waiting for it", target)
            has_warned = True
        time.sleep(delay)
        delay = min(2.0, 1.5 * delay)
    return None


@contextmanager
def alive(folder: Path) -> Iterator[None]:
    """Shows other processes that a claimed folder's builder lives, while the block runs."""
    finished = threading.Event()

    def beat() -> None:
        while not finished.wait(BEAT):
            with suppress(OSError):
                os.utime(folder if lock is None else lock)

    lock = _locked(folder)
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()
        if lock is not None:
            with suppress(FileNotFoundError):
                os.unlink(_MACHINE, dir_fd=lock)
            os.close(lock)


def _folder(target: Path, number: int) -> Path:
    return target.parent / f".{target.name}.building-{number}"


def _newest(target: Path) -> int:
    prefix = _folder(target, 0).name[:-1]
    names = [name for name in os.listdir(target.parent) if name.startswith(prefix)]
    return max((int(n[len(prefix) :]) for n in names if n[len(prefix) :].isdecimal()), default=0)


def _locked(folder: Path) -> int | None:
    """A lock on a folder, which ends with this process; None where there are no locks."""
    machine = _machine()
    if machine is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (folder / _MACHINE).write_text(machine)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _was_killed(folder: Path) -> bool:
    """Whether a folder's builder ran on this machine and was killed."""
    try:
        if (folder / _MACHINE).read_text() != _machine():
            return False
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        # Shared: other processes may test it at the same time.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # A builder that has just finished removed this file.
        return (folder / _MACHINE).exists()
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _machine() -> str | None:
    """An id of this start of the machine, the same in all its containers; None if unknown."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
