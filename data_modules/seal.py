"""What a folder of the cache holds, by digests that are made with it and compared when it is used.

A disk, a copy that was broken off or a program may change a file and keep its size; what is trained
or evaluated on it would be other numbers without a word.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from data_modules.digests import content_digest
from mtp_lightning.errors import UserError

log = logging.getLogger(__name__)

FILE = "digests.json"


def note(folder: Path, digests: Mapping[str, str]) -> None:
    """Keep the digests of files that were made while they were written: :func:`seal` need not read
    these again.

    Args:
        folder: with the files.
        digests: blake2b of 16 bytes, in hex, by name.
    """
    temporary = folder / f".{FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(dict(digests), indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / FILE)


def seal(folder: Path) -> None:
    """Keep the digests of all files of a folder; of those that are kept already, as they are."""
    known: dict[str, str] = {}
    with suppress(FileNotFoundError):
        known = json.loads((folder / FILE).read_text("utf-8"))
    names = sorted(p.name for p in folder.iterdir() if p.name[0] != "." and p.name != FILE)
    note(folder, {name: known.get(name) or content_digest(folder / name)[1] for name in names})


def require_sealed(folder: Path, memory: Path) -> None:
    """Make sure that a folder's files are as they were sealed.

    A folder from before there were digests gets them, in one line: what it holds is taken as it is.

    Args:
        folder: that was sealed.
        memory: remembers the digests of large files, which are read again only when they have
            changed.

    Raises:
        UserError: a file has other contents, or is gone.
        OSError: one cannot be read.
    """
    try:
        known = json.loads((folder / FILE).read_text("utf-8"))
        for name, expected in known.items():
            if content_digest(folder / name, memory)[1] != expected:
                raise damaged(folder, f"{name} has other contents than it was built with")
    except UserError:
        raise
    except FileNotFoundError as error:
        if error.filename != str(folder / FILE):
            raise damaged(folder, f"{Path(error.filename).name} is missing") from error
        log.warning("%s has no digests yet: its files are taken as they are now.", folder)
        with suppress(OSError):  # a cache that may only be read
            seal(folder)
    except (ValueError, TypeError, AttributeError) as error:
        raise damaged(folder, f"{FILE} is not what was written there") from error


def damaged(folder: Path, why: str) -> UserError:
    """The refusal of a folder of the cache."""
    return UserError(f"{folder} is damaged ({why}): delete that folder and start again")
