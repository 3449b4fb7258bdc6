"""The cache folder, and folders that are built once and appear whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger(__name__)

ENVIRONMENT = "MTP_LIGHTNING_CACHE"
_TEMPORARY = re.compile(r"^\.(?P<key>.+)\.building-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}$")


def cache_folder(given: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: the one given, else ``$MTP_LIGHTNING_CACHE``, else ``~/.cache/...``."""
    chosen = given or os.environ.get(ENVIRONMENT) or "~/.cache/mtp-lightning"
    return Path(chosen).expanduser()


def build_once(target: Path, build: Callable[[Path], None]) -> Path:
    """Makes sure that the folder ``target`` exists, complete.

    ``build`` fills a temporary folder beside it, which is then renamed. A folder is renamed in one
    step: a killed build leaves only the temporary one (removed by a later call, once the process
    that made it is gone), and of two builds at once the first to finish wins, the other takes the
    winner's folder.

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
    name = f".{target.name}.building-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    temporary = target.parent / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(target.parent)
        temporary.mkdir()
    except OSError as error:
        raise OSError(
            f"cannot write in the cache folder {target.parent} ({error.strerror}): "
            f"set data.cache_dir or the environment variable {ENVIRONMENT}"
        ) from error
    try:
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


def remove_stale(folder: Path) -> list[Path]:
    """Removes what killed builds left behind: temporary folders of dead processes of this host.

    Folders of live processes, and those of other hosts that share the disk, stay.

    Returns:
        The removed folders.
    """
    removed = []
    for path in folder.iterdir():
        match = _TEMPORARY.match(path.name)
        if match and match["host"] == socket.gethostname() and not _alive(int(match["pid"])):
            log.info("removing what a killed build left behind: %s", path)
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


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
