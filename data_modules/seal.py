"""Digests of a cache folder's files, made when the folder is built and checked when it is used.

A disk, an interrupted copy or a program may change a file and keep its size; training or evaluating
on it would silently give other numbers.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from data_modules.digests import content_digest, write_record
from mtp_lightning.errors import UserError

FILE = "digests.json"


def note(folder: Path, digests: dict[str, str]) -> None:
    """Stores digests (16-byte blake2b in hex, by file name) that were computed while the files were
    written, so :func:`seal` need not read these files again."""
    write_record(folder / FILE, digests)


def seal(folder: Path) -> None:
    """Stores the digests of all files of a folder; digests from :func:`note` are kept."""
    digests: dict[str, str] = {}
    with suppress(FileNotFoundError):
        digests = json.loads((folder / FILE).read_text("utf-8"))
    names = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and p.name != FILE)
    note(folder, {name: digests.get(name) or content_digest(folder / name)[1] for name in names})


def require_sealed(folder: Path, digest_cache: Path) -> None:
    """Checks that a folder's files are as they were sealed. ``digest_cache`` is as in
    :func:`content_digest`.

    Raises:
        UserError: if a file has other contents or is missing.
    """
    try:
        digests = json.loads((folder / FILE).read_text("utf-8"))
        stored = digests.items()
        changed = next(
            (n for n, d in stored if content_digest(folder / n, digest_cache)[1] != d), None
        )
    except FileNotFoundError as error:
        raise damaged(folder, f"{Path(error.filename).name} is missing") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{FILE} cannot be read as digests") from error
    if changed is not None:
        raise damaged(folder, f"{changed} has other contents than it was built with")


def damaged(folder: Path, why: str) -> UserError:
    """The error for a damaged folder of the cache."""
    return UserError(f"{folder} is damaged ({why}): delete that folder and start again")
