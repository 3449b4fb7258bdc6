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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from data_modules.digests import stamp
from data_modules.seal import require_sealed, seal
from mtp_lightning.run.lock import Lock
from mtp_lightning.system import sync_file, sync_folder

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
# Seconds after which the unchanged files of a build are removed, if that build may still live.
_STALE_SECONDS = 86_400.0


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """The given cache folder, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/mtp-lightning``."""
    chosen = folder or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning"
    return Path(os.path.expanduser(chosen))  # unlike Path.expanduser, leaves an unknown ~name


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
    others wait for its lock, which ends with it.

    The new folder is renamed to the target in one step. Where the file system has no locks, or has
    them on each machine alone, several processes may build, and all use the folder of the first to
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
    temporary = target.parent / f".{target.name}.building-{uuid4().hex}@{os.uname().nodename}"
    with ExitStack() as stack:
        try:
            if target.is_dir():
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target, alone=stack.enter_context(_locked(target)))
            stack.callback(shutil.rmtree, temporary, ignore_errors=True)
            temporary.mkdir()
            # After mkdir, which has the client of a file server look at the folder again.
            if target.is_dir():
                return False
        except OSError as error:
            raise OSError(
                f"cannot write in the cache folder {target.parent} ({error.strerror}): "
                f"set the environment variable {ENVIRONMENT} (in training also data.cache_dir)"
            ) from error
        try:
            build(temporary)
            seal(temporary)
            for path in temporary.iterdir():  # or a power cut could leave a folder of empty files
                sync_file(path)
            sync_folder(temporary)
            os.rename(temporary, target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(
                    f"cannot build {target} ({os.strerror(error.errno)}): free some space, or set "
                    f"the environment variable {ENVIRONMENT} (in training also data.cache_dir) to "
                    "a folder on another disk"
                ) from error
            if error.filename2 is None or not target.is_dir():
                raise
            log.info("another process built %s first: using its files", target)
            return False
        sync_folder(target.parent)
        return True


@contextmanager
def _locked(target: Path) -> Iterator[bool]:
    """Waits while another process builds ``target``; yields whether none does during the block, as
    far as the locks reach."""
    path = target.parent / f".{target.name}.lock"
    lock = Lock(path)
    with suppress(OSError):  # no locks here, or another user's file: build without one
        if not lock.acquire():
            log.warning("another process builds %s: waiting until it frees %s", target, path)
            lock.wait(seconds=math.inf)
    try:
        yield lock.excludes
    finally:
        lock.release(remove=True)


def _remove_leftovers(target: Path, *, alone: bool) -> None:
    """Removes the files of killed builds: of this folder on this machine, if this process is the
    only one to build it here, and all that have not changed for a day. Locks may not reach other
    machines, whose builds may still live."""
    mine = f".{target.name}.building-", f"@{os.uname().nodename}"
    for path in target.parent.glob(".*.building-*"):
        with suppress(OSError):  # finished just now
            changed = max(file.stat().st_mtime for file in (path, *path.iterdir()))
            killed = alone and path.name.startswith(mine[0]) and path.name.endswith(mine[1])
            if killed or changed < time.time() - _STALE_SECONDS:
                log.info("removing the files of a killed build: %s", path)
                shutil.rmtree(path, ignore_errors=True)
