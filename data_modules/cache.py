"""The cache folder, and folders that are built once and appear whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from data_modules.seal import require_sealed, seal
from mtp_lightning.lock import Lock
from mtp_lightning.system import sync_file, sync_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
# Seconds in which a build writes something; else it was killed.
_SILENCE = 3600.0


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The given cache folder, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/mtp-lightning``."""
    chosen = given or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning"
    return Path(chosen).expanduser()


def state_of(path: Path, known: str) -> str:
    """A cache key for a file, or the files of a folder, in their current state: ``PATH-STATE``, two
    hex digests. Every change of a file updates its ctime, which no program can set.

    Args:
        path: the file or folder.
        known: everything else that the cached content depends on.
    """
    path = path.resolve()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [(file.name, file.stat()) for file in files if file.is_file()]
    states = [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for n, s in found]
    texts = str(path), json.dumps([states, known])
    return "-".join(hashlib.sha256(text.encode()).hexdigest()[:16] for text in texts)


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes sure that the folder ``target`` exists and is complete.

    One process of all that need it builds it, and the others wait; a lock that ends with its
    process tells them when. ``build`` fills a temporary folder next to the target, which is then
    renamed in one step. If several build anyway, because the file system has no locks, the first to
    finish wins and the others use its folder. What a killed build leaves is removed by the next
    build, an hour or more later.

    A built folder is sealed, and its files are checked at each later use
    (:mod:`data_modules.seal`).

    Args:
        target: the folder, ``CACHE/KIND/KEY``.
        build: writes all files into the folder that it receives.

    Returns:
        ``target``.

    Raises:
        UserError: if the folder's files are not those that were built.
        OSError: if the folder cannot be written, with the remedy.
    """
    if target.is_dir() or not _built(target, build):
        require_sealed(target, target.parent.parent / "digests")
    return target


def _built(target: Path, build: Callable[[Path], None]) -> bool:
    """Whether this process built the folder, and not another one."""
    lock = Lock(target.with_name(f".{target.name}.lock"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if not lock.acquire():
            log.warning("another process builds %s: waiting for it", target)
            lock.wait(seconds=math.inf)
    except OSError as error:
        raise OSError(
            f"cannot write in the cache folder {target.parent} ({error.strerror}): "
            f"set data.cache_dir or the environment variable {ENVIRONMENT}"
        ) from error
    try:
        return not target.is_dir() and _build(target, build)
    finally:
        lock.release(remove=True)


def _build(target: Path, build: Callable[[Path], None]) -> bool:
    """As :func:`_built`; nobody else builds the folder where the file system has locks."""
    _remove_silent(target.parent)
    temporary = target.with_name(f".{target.name}.building-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        build(temporary)
        seal(temporary)
        for path in temporary.iterdir():  # or a power cut could leave a folder of empty files
            sync_file(path)
        sync_folder(temporary)
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


def _remove_silent(folder: Path) -> None:
    """Remove what killed builds have left. Silence decides, since the locks of a shared file system
    may hold on one machine only."""
    for path in folder.glob(".*.building-*"):
        with suppress(FileNotFoundError):  # finished just now
            written = max(file.stat().st_mtime for file in (path, *path.iterdir()))
            if written < time.time() - _SILENCE:
                log.info("removing what a killed build left: %s", path)
                shutil.rmtree(path, ignore_errors=True)
