"""A lock that several processes ask for and one has."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Lock:
    """Held until it is released and every process that inherited it has ended, however it ended.

    Process numbers are used again after a crash or a restart; the system's lock on a file is not
    held a moment too long.

    Args:
        path: a file that is there for the lock alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None

    def acquire(self) -> bool:
        """Whether it could be had, at once."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True

    def wait(self, *, seconds: float) -> bool:
        """Whether it could be had within some seconds."""
        until = time.monotonic() + seconds
        while not self.acquire():
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
        return True

    @property
    def file(self) -> int:
        """The file descriptor, which a child process can be given (``pass_fds``)."""
        assert self._file is not None, "not held"
        return self._file

    def release(self) -> None:
        """Let go of it in this process."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @contextmanager
    def held(self, *, seconds: float) -> Iterator[None]:
        """Have it for a block, after waiting for it.

        Args:
            seconds: to wait at most.

        Raises:
            BlockingIOError: another process still has it.
        """
        if not self.wait(seconds=seconds):
            raise BlockingIOError(f"{self._path} is held by another process.")
        try:
            yield
        finally:
            self.release()
