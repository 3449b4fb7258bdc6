"""Replaces files as a whole: even after a crash or on a full disk, the old file or the new one is
there, never a part.

The new content is written to a temporary name in the same folder, synced to the disk, and renamed
over the old file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtp_lightning.system import sync_file, sync_folder


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary file, which replaces ``path`` when the block ends without an error.

    Args:
        path: the file to replace. Its folder must exist.
        shared: whether several processes may replace it at once; each then has its own temporary
            name. Otherwise the name is fixed, so that the next write overwrites what a kill left.
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
        # Renaming one hard link over another does nothing, and leaves the temporary name.
        with suppress(OSError):
            temporary.unlink()
    sync_folder(path.parent)


def write_bytes(content: bytes, path: Path, *, shared: bool = False) -> None:
    """Replace a file by ``content``; see :func:`replacing` for the other arguments."""
    with replacing(path, shared=shared) as temporary:
        temporary.write_bytes(content)


def write_json(content: dict[str, Any], path: Path, *, shared: bool = False) -> None:
    """Replace a file by indented JSON, where NaN and infinity are null, since JSON has neither."""
    text = json.dumps(_finite(content), indent=2, allow_nan=False)
    write_bytes(f"{text}\n".encode(), path, shared=shared)


def _finite(node: Any) -> Any:
    """Nested plain containers with None in place of numbers that are not finite."""
    if isinstance(node, Mapping):
        return {key: _finite(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(value) for value in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
