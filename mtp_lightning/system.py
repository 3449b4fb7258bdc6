"""What is asked of the operating system, where one differs from another; no torch."""

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

# What fsync says where a file system has none: some in user space or of other machines.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
# The number of the process that has started this one, to end with it.
STARTER = "MTP_LIGHTNING_STARTED_BY"
_PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


def sync_file(path: Path) -> None:
    """Bring a file to the disk; where its file system cannot be asked to, that is left to it.

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
    """Make a rename durable. Not every system can open a folder; there the rename itself must
    do."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def end_with(parent: int) -> bool:
    """Have this process killed when its parent ends, however that ends.

    Linux does it when the thread ends that has started this process; elsewhere a thread looks once
    a second.

    Args:
        parent: the number of the process that is to be the parent.

    Returns:
        Whether it is; else it has ended already, or never was.
    """
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_look_after, args=(parent,), daemon=True).start()
    return os.getppid() == parent


def end_with_starter() -> bool:
    """The same of the process that :data:`STARTER` names in the environment; true without one."""
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
