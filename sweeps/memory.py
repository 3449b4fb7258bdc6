"""How much of a machine's memory a sweep's jobs take, and whether there is room for one more.

A job takes what the jobs before it have taken, at their most. Until one has ended, it takes at
least a gigabyte a process, or what a running one takes already.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from sweeps.cores import groups_around

# What a process of a small model takes, and something more.
UNKNOWN_BYTES = 1_000_000_000


class MemoryUse:
    """What jobs were seen to take, and what they may.

    Args:
        root: of the file system, for tests.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        # Of the jobs that run, by process group: processes, bytes now, and at most.
        self._processes: dict[int, int] = {}
        self._now: dict[int, int] = {}
        self._most: dict[int, int] = {}
        # Of one process, by jobs that have run to their end.
        self._known: int | None = None

    def begin(self, group: int, processes: int) -> None:
        """Count a job that has just been started."""
        self._processes[group], self._now[group], self._most[group] = processes, 0, 0

    def look(self) -> None:
        """Measure the jobs that run."""
        taken = of_groups(self._root)
        for group in self._processes:
            self._now[group] = taken.get(group, 0)
            self._most[group] = max(self._most[group], self._now[group])

    def end(self, group: int, *, well: bool) -> None:
        """Forget a job.

        Args:
            group: its process group.
            well: whether it ran to its end, and so has taken all that such a job takes.
        """
        of_one = self._most.pop(group) // self._processes.pop(group)
        del self._now[group]
        if well and of_one:  # 0 where it was too short to be looked at
            self._known = max(self._known or 0, of_one)

    @property
    def of_one(self) -> int:
        """Bytes that a process of the next job is expected to take."""
        running = (most // self._processes[group] for group, most in self._most.items())
        return max(UNKNOWN_BYTES if self._known is None else self._known, *running, 0)

    def missing(self, processes: int) -> str | None:
        """Why a job of some processes has no room beside those that run; None where it has."""
        free = available(self._root)
        if free is None:
            return None
        # What has just begun has not taken yet what it will.
        wanted, of_one = self.of_one * processes, self.of_one
        promised = sum(
            max(0, of_one * n - self._now[group]) for group, n in self._processes.items()
        )
        if free - promised >= wanted:
            return None
        return (
            f"{free / 1e9:.1f} GB are available, of which those that run will take "
            f"{promised / 1e9:.1f} more, and one more takes {wanted / 1e9:.1f}"
        )


def available(root: Path = Path("/")) -> int | None:
    """Bytes that can be had without swapping, by the system and by the control groups of this
    process; None where nobody says.

    Args:
        root: of the file system, for tests.
    """
    found = [*_of_system(root), *_of_groups(root)]
    return min(found) if found else None


def of_groups(root: Path = Path("/")) -> dict[int, int]:
    """Bytes that the processes of each process group have for themselves: what is of files, such
    as libraries, is shared."""
    taken: defaultdict[int, int] = defaultdict(int)
    if not (root / "proc").is_dir():  # macOS, where nobody says what is available either
        return {}
    for name in os.listdir(root / "proc"):
        if name.isdecimal():
            with suppress(OSError, ValueError, IndexError):  # it has just ended
                folder = root / "proc" / name
                # Behind the program's name, which may hold anything.
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                taken[group] += sum(_fields(folder / "status", ("RssAnon", "RssShmem")))
    return dict(taken)


def _of_system(root: Path) -> Iterator[int]:
    with suppress(OSError):
        yield from _fields(root / "proc/meminfo", ("MemAvailable",))


def _of_groups(root: Path) -> Iterator[int]:
    """Of ``memory.max`` ("max" for none) of the group of this process and of all around it."""
    for folder in groups_around(root):
        with suppress(OSError, ValueError):
            most = int((folder / "memory.max").read_text())
            stat = (folder / "memory.stat").read_text().split()
            files = int(stat[stat.index("inactive_file") + 1])  # given back when it is needed
            yield max(0, most - int((folder / "memory.current").read_text()) + files)


def _fields(file: Path, names: tuple[str, ...]) -> Iterator[int]:
    """Values of lines such as ``MemAvailable:   123 kB``, in bytes."""
    for line in file.read_text().splitlines():
        name, _, value = line.partition(":")
        if name in names:
            yield int(value.split()[0]) * 1024
