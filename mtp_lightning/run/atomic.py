"""Files that are replaced as a whole: after a crash or on a full disk, too, the old one or the new.

The new content goes to a temporary name in the same folder, is brought to the disk, and is renamed
over the old file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtp_lightning.system import sync_file, sync_folder


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Where to write what shall take the place of ``path`` when the block ends without an error.

    Args:
        path: of the file; its folder exists.
        shared: several processes may do this at once. A single one has a fixed temporary name, so
            that what a kill left is overwritten.
    """
    mark = f".{os.getpid()}" if shared else ""
    temporary = path.with_name(f".{path.name}{mark}.tmp")
    with suppress(FileNotFoundError):
        temporary.unlink()
    try:
        yield temporary
        sync_file(temporary)
        os.replace(temporary, path)
    finally:
        # Also after a rename between two names of one file, which does nothing.
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def write_bytes(content: bytes, path: Path, *, shared: bool = False) -> None:
    """Replace a file; arguments as :func:`replacing`."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_bytes(content)


def write_json(content: dict[str, Any], path: Path, *, shared: bool = False) -> None:
    """Replace a file by indented JSON; NaN and infinity are written as Python reads them back."""
    write_bytes((json.dumps(content, indent=2) + "\n").encode(), path, shared=shared)
