"""A lock between processes."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# flock's errors on file systems without locks, where two processes are not told apart.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


class Lock:
    """A lock that one process holds until it and all children that inherited it release it or end.

    It is the system's lock on a file that serves as the lock only. A crash releases it too. A file
    with a process number would not do: the system reuses these numbers.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: int | None = None
        self.excludes = False
        """Whether no other process can hold the lock now: the file system has locks."""

    def acquire(self) -> bool:
        """Try to take the lock without waiting; return whether it was free."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        excludes = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(file)
                # ESTALE: its holder has removed the file meanwhile, on another machine.
                if isinstance(error, BlockingIOError) or error.errno == errno.ESTALE:
                    return False
                raise
            excludes = False
        if not os.fstat(file).st_nlink:  # its holder has removed the file meanwhile
            os.close(file)
            return False
        self._file, self.excludes = file, excludes
        return True

    def wait(self, *, seconds: float, before: Callable[[], object] | None = None) -> bool:
        """Try to take the lock for some seconds; return whether it became free. Each attempt calls
        ``before`` first, whose exception ends the wait."""
        until, delay = time.monotonic() + seconds, 0.1
        while True:
            if before is not None:
                before()
            if self.acquire():
                return True
            if time.monotonic() > until:
                return False
            time.sleep(delay)
            delay = min(1.0, 1.1 * delay)  # an hour's wait must not load a file server

    def is_free(self) -> bool:
        """Whether a process has held the lock and none does now; false where that is unknown."""
        try:
            file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # held, or a file system without locks
            return False
        finally:
            os.close(file)
        return True

    @property
    def file(self) -> int:
        """The file descriptor of the lock, which a child process can inherit (``pass_fds``)."""
        assert self._file is not None, "not held"
        return self._file

    def release(self, *, remove: bool = False) -> None:
        """Release the lock in this process, after removing its file if asked: whoever has opened
        that file already does not get the lock."""
        if self._file is not None:
            if remove:
                with suppress(OSError):
                    self._path.unlink()
            os.close(self._file)
            self._file, self.excludes = None, False

    @contextmanager
    def held(self, *, seconds: float) -> Iterator[None]:
        """Wait at most ``seconds`` for the lock, and hold it during a block.

        Raises:
            BlockingIOError: another process holds the lock for longer.
        """
        if not self.wait(seconds=seconds):
            raise BlockingIOError(f"{self._path} is held by another process.")
        try:
            yield
        finally:
            self.release()
