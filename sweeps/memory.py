"""Memory of a sweep's jobs, and whether the machine has room for one more.

A job is expected to take the most that finished jobs took. Until one has finished, it is expected
to take a gigabyte per process, or what a running one takes, if that is more.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sweeps.cores import groups_around

# More than a process of a small model takes.
UNKNOWN_BYTES = 1_000_000_000


class MemoryUse:
    """Measured and expected memory of jobs.

    Args:
        root: root of the file system, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        # Of the running jobs, by process group: processes, bytes now, and most bytes so far.
        self._processes: dict[int, int] = {}
        self._now: dict[int, int] = {}
        self._most: dict[int, int] = {}
        # Most bytes per process of the jobs that have finished.
        self._known: int | None = None

    def begin(self, group: int, processes: int) -> None:
        """Adds a job that has just been started."""
        self._processes[group], self._now[group], self._most[group] = processes, 0, 0

    def look(self) -> None:
        """Measures the running jobs."""
        taken = of_groups(self._root)
        for group in self._processes:
            self._now[group] = taken.get(group, 0)
            self._most[group] = max(self._most[group], self._now[group])

    def end(self, group: int, *, well: bool) -> None:
        """Removes a job.

        Args:
            group: its process group.
            well: whether it finished, so that its memory is representative.
        """
        of_one = self._most.pop(group) // self._processes.pop(group)
        del self._now[group]
        if well and of_one:  # 0 if it ended before the first look
            self._known = max(self._known or 0, of_one)

    @property
    def of_one(self) -> int:
        """Bytes that a process of the next job is expected to take."""
        running = (most // self._processes[group] for group, most in self._most.items())
        return max(UNKNOWN_BYTES if self._known is None else self._known, *running, 0)

    def missing(self, processes: int) -> str | None:
        """Why there is no room for a job of some processes; None if there is."""
        free = available(self._root)
        if free is None:
            return None
        # A new job has not yet taken all that it will.
        wanted, of_one = self.of_one * processes, self.of_one
        promised = sum(
            max(0, of_one * n - self._now[group]) for group, n in self._processes.items()
        )
        if free - promised >= wanted:
            return None
        return (
            f"{free / 1e9:.1f} GB are available, of which the running jobs will take "
            f"{promised / 1e9:.1f} more, and one more job takes {wanted / 1e9:.1f}"
        )


def available(root: Path = Path("/")) -> int | None:
    """Bytes available without swapping, by the system and by the control groups of this process;
    None if unknown.

    Args:
        root: root of the file system, for tests.
    """
    found = [*_of_system(root), *_of_groups(root)]
    return min(found) if found else None


def of_groups(root: Path = Path("/")) -> dict[int, int]:
    """Bytes of private memory of each process group; pages of files, such as libraries, are
    shared."""
    taken: defaultdict[int, int] = defaultdict(int)
    if not (root / "proc").is_dir():  # macOS, which does not report available memory either
        return {}
    for name in os.listdir(root / "proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):  # the process has just ended
                folder = root / "proc" / name
                # The fields come after the program's name, which may hold any characters.
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                taken[group] += sum(_fields(folder / "status", ("RssAnon", "RssShmem")))
    return dict(taken)


def _of_system(root: Path) -> Iterator[int]:
    with suppress(OSError):
        yield from _fields(root / "proc/meminfo", ("MemAvailable",))


def _of_groups(root: Path) -> Iterator[int]:
    """Room below ``memory.max`` ("max" for no limit) of this process's group and its parents."""
    for folder in groups_around(root):
        with suppress(OSError, ValueError):
            most = int((folder / "memory.max").read_text())
            stat = (folder / "memory.stat").read_text().split()
            files = int(stat[stat.index("inactive_file") + 1])  # reclaimed when needed
            yield max(0, most - int((folder / "memory.current").read_text()) + files)


def _fields(file: Path, names: tuple[str, ...]) -> Iterator[int]:
    """Values of lines such as ``MemAvailable:   123 kB``, in bytes."""
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            yield int(value.split()[0]) * 1024
