"""The cache folder, and folders that are built once and appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from data_modules.build_turn import alive, folder_to_build
from data_modules.digests import stamp
from data_modules.seal import require_sealed, seal
from mtp_lightning.system import sync_file, sync_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
STALE_SECONDS = 600.0
"""Seconds without a sign of life after which the remains of a build are removed."""


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The given cache folder, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/mtp-lightning``."""
    return Path(folder or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning").expanduser()


def cache_key(path: Path, options: str) -> str:
    """The cache key of a file, or of a folder and the folders in it: two hex digests,
    ``PATH-STATE``. The state has the files' names and :func:`stamp`, and ``options``, on which the
    cached content depends, too."""
    path = path.resolve()
    files = sorted([*path.glob("*"), *path.glob("*/*")]) if path.is_dir() else [path]
    states = [(str(f.relative_to(path)), *stamp(f.stat())) for f in files if f.is_file()]
    parts = os.fsencode(path), json.dumps([states, options]).encode()
    return "-".join(hashlib.sha256(data).hexdigest()[:16] for data in parts)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Returns the folder ``target``, which one of the processes that need it builds while the
    others wait (:mod:`data_modules.build_turn`).

    The new folder is renamed to the target in one step. A killed build leaves only a temporary
    folder, which a later call removes once it has shown no sign of life for :data:`STALE_SECONDS`.
    If two processes build because one was taken for dead, both use the folder of the first to
    finish. The files are checked at each later use (:mod:`data_modules.seal`).

    Args:
        target: the folder, ``CACHE/KIND/KEY``.
        build: writes all files into the folder that it receives.

    Raises:
        UserError: if the folder's files are not those that were built.
        OSError: if the folder cannot be written, with the remedy.
    """
    if not _built(target, build):
        require_sealed(target, target.parent.parent / "digests")
    return target


def _built(target: Path, build: Callable[[Path], None]) -> bool:
    """Builds a missing folder or waits for it; returns whether this process built it."""
    try:
        if target.is_dir():
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        turn = folder_to_build(target)
    except OSError as error:
        raise OSError(
            f"cannot write in the cache folder {target.parent} ({error.strerror}): "
            f"set the environment variable {ENVIRONMENT} (in training also data.cache_dir)"
        ) from error
    if turn is None:
        return False
    # Of this process alone: while it is stopped, its turn may be removed and made by another.
    temporary = turn / uuid4().hex
    try:
        with alive(turn):
            temporary.mkdir(parents=True)
            (temporary / ".unfinished").touch()
            build(temporary)
            seal(temporary)
            (temporary / ".unfinished").unlink()  # refuses a removed folder that was made again
            for path in temporary.iterdir():  # or a power cut could leave a folder of empty files
                sync_file(path)
            sync_folder(temporary)
            os.rename(temporary, target)
        sync_folder(target.parent)
        return True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(
                f"cannot build {target} ({os.strerror(error.errno)}): free some space, or set "
                f"the environment variable {ENVIRONMENT} (in training also data.cache_dir) to a "
                "folder on another disk"
            ) from error
        removed = isinstance(error, FileNotFoundError) and str(turn) in str(error.filename)
        if target.is_dir() and (removed or error.filename2 is not None):
            log.info("another process built %s first: using its files", target)
            return False
        if removed:
            raise OSError(
                f"the unfinished {target} was removed, as this process was stopped: start again"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):  # another process may build in it now
            turn.rmdir()


def _remove_stale(folder: Path) -> None:
    """Removes temporary folders without a sign of life. The builder's process is not looked up:
    containers may share a host name without seeing each other's processes."""
    builds = list(folder.glob(".*.building-*"))
    if not builds:
        return
    # The disk's clock: hosts that share a disk may have different clocks.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".clock-") as probe:
        now = os.stat(probe).st_mtime
    for path in builds:
        with suppress(FileNotFoundError):  # finished just now
            if path.stat().st_mtime < now - STALE_SECONDS:
                log.info("removing the remains of a killed build: %s", path)
                shutil.rmtree(path, ignore_errors=True)
