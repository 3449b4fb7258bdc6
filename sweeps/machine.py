"""The memory that jobs may use on this machine, by the system and its control groups.

A job is expected to take the most memory that finished jobs took. Until one has finished, it is
expected to take a gigabyte per process, or what a running one takes, if that is more.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mtp_lightning.system import groups_around

# More than a process of a small model takes.
UNKNOWN_BYTES = 1_000_000_000


@dataclass
class _JobMemory:
    """The memory of a running job."""

    processes: int
    current: int = 0  # bytes at the last look
    peak: int = 0  # bytes at any look

    @property
    def per_process(self) -> int:
        """The most bytes of one of its processes."""
        return self.peak // self.processes


class MemoryUse:
    """Measured and expected memory of jobs; ``root`` is the root of the file system, for tests."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self._running: dict[int, _JobMemory] = {}  # by process group
        self._known_peak = 0  # most bytes per process of the jobs that have finished

    def begin(self, group: int, processes: int) -> None:
        self._running[group] = _JobMemory(processes)

    def look(self) -> None:
        group_bytes = bytes_by_group(self._root)
        for group, job in self._running.items():
            job.current = group_bytes.get(group, 0)
            job.peak = max(job.peak, job.current)

    def end(self, group: int, *, succeeded: bool) -> None:
        """Removes a job; the memory of one that ``succeeded`` is representative."""
        job = self._running.pop(group)
        if succeeded and job.per_process:  # 0 if it ended before the first look
            self._known_peak = max(self._known_peak, job.per_process)

    @property
    def per_process(self) -> int:
        """Bytes that a process of the next job is expected to take."""
        running = [job.per_process for job in self._running.values()]
        return max([self._known_peak or UNKNOWN_BYTES, *running])

    def missing(self, processes: int) -> str | None:
        """Why there is no room for a job of some processes; None if there is."""
        free = available(self._root)
        if free is None:
            return None
        # A new job has not yet taken all that it will.
        per_process, jobs = self.per_process, self._running.values()
        needed = per_process * processes
        promised = sum(max(0, per_process * job.processes - job.current) for job in jobs)
        if free - promised >= needed:
            return None
        return (
            f"{free / 1e9:.1f} GB are available, of which the running jobs will take "
            f"{promised / 1e9:.1f} more, and one more job takes {needed / 1e9:.1f}"
        )


def available(root: Path = Path("/")) -> int | None:
    """Bytes available without swapping, by the system and by this process's control groups; None if
    unknown. ``root`` is the root of the file system, for tests."""
    limits = [*_fields(root / "proc/meminfo", ("MemAvailable",)), *_room_in_groups(root)]
    return min(limits) if limits else None


def bytes_by_group(root: Path = Path("/")) -> dict[int, int]:
    """Bytes of private memory by process group; pages of files, such as libraries, are shared."""
    group_bytes: defaultdict[int, int] = defaultdict(int)
    if not (root / "proc").is_dir():  # macOS, which does not report available memory either
        return {}
    for name in os.listdir(root / "proc"):
        if name.isdecimal():
            folder = root / "proc" / name
            with suppress(OSError, ValueError, IndexError):  # the process has just ended
                # The fields come after the program's name, which may hold any characters.
                group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
                group_bytes[group] += sum(_fields(folder / "status", ("RssAnon", "RssShmem")))
    return dict(group_bytes)


def _room_in_groups(root: Path) -> Iterator[int]:
    """Room below ``memory.max`` ("max" for no limit) of this process's group and its parents."""
    for folder in groups_around(root):
        with suppress(OSError, ValueError):
            limit = int((folder / "memory.max").read_text())
            stat = (folder / "memory.stat").read_text().split()
            file_bytes = int(stat[stat.index("inactive_file") + 1])  # reclaimed when needed
            yield max(0, limit - int((folder / "memory.current").read_text()) + file_bytes)


def _fields(file: Path, names: tuple[str, ...]) -> Iterator[int]:
    """Values of lines such as ``MemAvailable:   123 kB``, in bytes; none of an unreadable file."""
    with suppress(OSError):
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name in names:
                yield int(value.split()[0]) * 1024
