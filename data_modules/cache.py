"""The cache folder, and folders that are built once and appear whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_modules.claim import alive, claim
from data_modules.seal import require_sealed, seal
from mtp_lightning.system import sync_file, sync_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
LEASE = 600.0
"""Seconds without a sign of life after which what a build has left is removed."""
_TEMPORARY = re.compile(r"^\..+\.building-.+$")


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the one given, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/...``."""
    chosen = given or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning"
    return Path(chosen).expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes sure that the folder ``target`` exists, complete.

    One of all processes that want it builds, and the others wait (:mod:`data_modules.claim`).
    ``build`` fills a temporary folder beside the target, which is then renamed. A folder is renamed
    in one step: a killed build leaves only the temporary one (removed by a later call, once it has
    shown no sign of life for :data:`LEASE`). Should two build all the same, because one was taken
    for dead, the first to finish wins, and the other takes the winner's folder.

    What was built is sealed, and whoever finds it asks whether it is as it was
    (:mod:`data_modules.seal`).

    Args:
        target: the folder to have, ``CACHE/KIND/KEY``.
        build: writes all files into the folder it is given.

    Returns:
        ``target``.

    Raises:
        UserError: the folder's files are not those that were built.
        OSError: if the folder cannot be written, with the remedy.
    """
    if target.is_dir() or not _built(target, build):
        require_sealed(target, target.parent.parent / "digests")
    return target


def _built(target: Path, build: Callable[[Path], None]) -> bool:
    """Whether this process has built it; else another has."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if any(_TEMPORARY.match(name) for name in os.listdir(target.parent)):
            remove_stale(target.parent, now=_time_of(target.parent))
        temporary = claim(target)
    except OSError as error:
        raise OSError(
            f"cannot write in the cache folder {target.parent} ({error.strerror}): "
            f"set data.cache_dir or the environment variable {ENVIRONMENT}"
        ) from error
    if temporary is None:
        return False
    try:
        with alive(temporary):
            build(temporary)
            seal(temporary)
            _sync(temporary)
        try:
            os.rename(temporary, target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or not target.is_dir():
                raise
            log.info("another process built %s first: using its files", target)
            return False
        sync_folder(target.parent)
        return True
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


def _time_of(folder: Path) -> float:
    """The present time by a disk's own clock, which hosts that share it may not have."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".clock-") as new:
        return os.stat(new).st_mtime


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


def _sync(folder: Path) -> None:
    """Brings the files to the disk, so that a power cut cannot rename a folder of empty files."""
    for path in folder.iterdir():
        sync_file(path)
    sync_folder(folder)
