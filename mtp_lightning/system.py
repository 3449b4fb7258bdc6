"""What operating systems do differently (syncing files, ending with the parent, counting cores),
and the machine in words."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

# fsync's errors on file systems without it, such as some network file systems.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# Environment variable: the number of the process that started this one, which ends with it.
STARTER = "MTP_LIGHTNING_STARTED_BY"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def sync_file(path: Path) -> None:
    """Sync a file to the disk, if its file system supports that.

    Raises:
        OSError: the disk is full or broken.
    """
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise


def sync_folder(folder: Path) -> None:
    """Make a rename in a folder durable, on systems that can open folders."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def end_with(parent: int) -> bool:
    """Have this process killed when its parent ends for any reason.

    On Linux the kernel does it, when the parent's thread that started this process ends. Elsewhere
    a thread checks once per second.

    Returns:
        Whether that process is the parent now; if not, it has already ended.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    return os.getppid() == parent


def end_with_starter() -> bool:
    """Call :func:`end_with` for the process that the environment variable :data:`STARTER` names;
    return True if it is not set."""
    starter = os.environ.pop(STARTER, None)  # not for the processes that this one starts
    return starter is None or end_with(int(starter))


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


# Flags of /proc/cpuinfo, the widest instructions first; in the words of a processor's name.
_INSTRUCTIONS = {"amx_tile": "AMX", "avx512bw": "AVX-512", "avx2": "AVX2"}


def processor(root: Path = Path("/")) -> str:
    """The name of this machine's processor with its widest instructions, as in "AMD EPYC with
    AVX2": virtual machines give processors of all generations one name. Empty where the system does
    not tell it. ``root`` is the root of the file system, for tests."""
    try:
        first = (root / "proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
    except OSError:
        return platform.processor()
    facts = {k.strip(): v.strip() for k, _, v in (x.partition(":") for x in first.splitlines())}
    name, flags = facts.get("model name", ""), facts.get("flags", "").split()
    widest = next((text for flag, text in _INSTRUCTIONS.items() if flag in flags), None)
    return f"{name} with {widest}" if name and widest else name


def this_machine() -> str:
    """This machine in the few words that a run's summary keeps, as in "Linux x86_64, 2 cores of AMD
    EPYC with AVX2". Two machines of one description have comparable speeds."""
    cores_of = f" of {name}" if (name := processor()) else ""
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores{cores_of}"


def cores() -> int:
    """Cores that this process may use, at least 1.

    Affinity alone is not enough: a container with a quota of two cores sees all cores of its
    machine.
    """
    n = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return n if quota is None else max(1, min(n, int(quota)))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Processor seconds per second that this process's control groups allow; None for no limit.
    ``root`` is the root of the file system, for tests."""
    return min((*_quotas_of_version_2(root), *_quotas_of_version_1(root)), default=None)


def groups_around(root: Path) -> Iterator[Path]:
    """The folder of this process's control group (version 2), and those of all its parents."""
    mounted = root / "sys/fs/cgroup"
    group = ""
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            if line.startswith("0::"):
                group = line[3:].strip("/")
    # In a container this may be the name on the host; the container's own group is then the root.
    parts = [part for part in group.split("/") if part not in ("", "..")]
    for n in range(len(parts), -1, -1):
        yield mounted.joinpath(*parts[:n])


def _quotas_of_version_2(root: Path) -> Iterator[float]:
    """Quotas in ``cpu.max`` ("200000 100000", or "max 100000") of the group and its parents."""
    for folder in groups_around(root):
        with suppress(OSError, ValueError):
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                yield int(quota) / int(period)


def _quotas_of_version_1(root: Path) -> Iterator[float]:
    """Quotas in ``cpu.cfs_quota_us``, which is -1 for none."""
    for name in ("cpu", "cpu,cpuacct"):
        folder = root / "sys/fs/cgroup" / name
        with suppress(OSError, ValueError, ZeroDivisionError):
            quota = int((folder / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                yield quota / int((folder / "cpu.cfs_period_us").read_text())
