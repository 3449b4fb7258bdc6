"""The cache folder, and folders that are built once and appear whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
LEASE = 600.0
"""Seconds without a sign of life after which a build is taken for dead."""
BEAT = 15.0
"""Seconds between two signs of life."""
_TEMPORARY = re.compile(r"^\..+\.building-.+$")


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the one given, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/...``."""
    chosen = given or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning"
    return Path(chosen).expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes sure that the folder ``target`` exists, complete.

    ``build`` fills a temporary folder beside it, which is then renamed. A folder is renamed in one
    step: a killed build leaves only the temporary one (removed by a later call, once it has shown
    no sign of life for :data:`LEASE`), and of two builds at once the first to finish wins, the
    other takes the winner's folder.

    Args:
        target: the folder to have; if it exists nothing is done.
        build: writes all files into the folder it is given.

    Returns:
        ``target``.

    Raises:
        OSError: if the folder cannot be written, with the remedy.
    """
    if target.is_dir():
        return target
    temporary = target.parent / f".{target.name}.building-{uuid.uuid4().hex}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        # The new folder's time is the disk's own clock, which hosts that share it may not have.
        remove_stale(target.parent, now=temporary.stat().st_mtime)
    except OSError as error:
        raise OSError(
            f"cannot write in the cache folder {target.parent} ({error.strerror}): "
            f"set data.cache_dir or the environment variable {ENVIRONMENT}"
        ) from error
    try:
        with _alive(temporary):
            build(temporary)
            _sync(temporary)
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not target.is_dir():
                raise
            log.info("another process built %s first: using its files", target)
        else:
            _sync_folder(target.parent)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise OSError(
                error.errno,
                f"the disk is full while building {target}: free some space, or set "
                f"data.cache_dir or the environment variable {ENVIRONMENT} to another disk",
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def remove_stale(folder: Path, *, now: float) -> list[Path]:
    """Removes what killed builds left behind: temporary folders without a sign of life.

    Neither host nor process are asked: containers share the name of the one without seeing the
    other.

    Args:
        folder: where folders are built.
        now: seconds of the disk's clock.

    Returns:
        The removed folders.
    """
    removed = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # finished just now
            if _TEMPORARY.match(path.name) and path.stat().st_mtime < now - LEASE:
                log.info("removing what a killed build left behind: %s", path)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
    return removed


@contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Touches a folder every :data:`BEAT` seconds while the block runs."""
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT):
            with suppress(OSError):
                os.utime(folder)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _sync(folder: Path) -> None:
    """Brings the files to the disk, so that a power cut cannot rename a folder of empty files."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
