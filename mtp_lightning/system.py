"""Operating-system calls that differ between systems: syncing files, ending with the parent."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import sys
import threading
import time
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
        threading.Thread(target=_look_after, args=(parent,), daemon=True).start()
    return os.getppid() == parent


def end_with_starter() -> bool:
    """Call :func:`end_with` for the process that the environment variable :data:`STARTER` names;
    return True if it is not set."""
    starter = os.environ.get(STARTER)
    return starter is None or end_with(int(starter))


def _look_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)


def processor() -> str:
    """The name of this machine's processor; empty where the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((x.partition(":")[2].strip() for x in lines if x.startswith("model name")), "")
