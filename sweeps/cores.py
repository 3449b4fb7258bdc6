"""Cores that this process may use: by its affinity, and by the quota of its control groups."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Cores that this process may use, at least 1.

    Affinity alone is not enough: a container with a quota of two cores sees all cores of its
    machine.
    """
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return seen if quota is None else max(1, min(seen, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processor seconds per second that this process's control groups allow; None for no limit.

    Args:
        root: root of the file system, for tests.
    """
    quotas = [*_version_2(root), *_version_1(root)]
    return min(quotas) if quotas else None


def groups_around(root: Path) -> Iterator[Path]:
    """The folder of this process's control group (version 2), and those of all its parents.

    Args:
        root: root of the file system, for tests.
    """
    mounted = root / "sys/fs/cgroup"
    group = ""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = line[3:].strip("/")
    # A container names the group as its machine sees it, but its own top is the container's.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for n in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:n])


def _version_2(root: Path) -> Iterator[float]:
    """Quotas in ``cpu.max`` ("200000 100000", or "max 100000") of the group and its parents."""
    for folder in groups_around(root):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)


def _version_1(root: Path) -> Iterator[float]:
    """Quotas in ``cpu.cfs_quota_us``, which is -1 for none."""
    for name in ("cpu", "cpu,cpuacct"):
        folder = root / "sys/fs/cgroup" / name
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                yield quota / int((folder / "cpu.cfs_period_us").read_text())
