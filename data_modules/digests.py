"""Digests of values and of files; the digests of large files are remembered until they change."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

LARGE = 1 << 20
"""Bytes from which a file's digest is remembered; a smaller file is as fast to read."""
_YOUNG = 2_000_000_000  # nanoseconds in which a file may change again without a new time stamp


def digest(*parts: object) -> str:
    """Hex digest of the parts' strings, each with its length, so that parts cannot be confused."""
    h = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = str(part).encode("utf-8", "surrogateescape")
        h.update(len(data).to_bytes(8, "little"))
        h.update(data)
    return h.hexdigest()


def content_digest(path: Path, digest_cache: Path | None = None) -> tuple[int, str]:
    """Size and hex digest of a file's content.

    Args:
        digest_cache: a folder with a record of the :func:`stamp` and digest of each large file. A
            file that changed a moment ago gets no record, and records that cannot be read or
            written are skipped.
    """
    before = stamp(path.stat())
    record = None
    if digest_cache is not None and before[0] >= LARGE:
        record = digest_cache / f"{digest(path.resolve())}.json"
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads(record.read_text(encoding="utf-8"))
            if stored["stamp"] == before and len(bytes.fromhex(stored["digest"])) == 16:
                return before[0], str(stored["digest"])
    with path.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16))
        size = file.tell()
    after = path.stat()
    settled = max(after.st_mtime_ns, after.st_ctime_ns) < time.time_ns() - _YOUNG
    if record is not None and settled and before == stamp(after) and size == before[0]:
        with suppress(OSError):
            entry = {"path": str(path.resolve()), "stamp": before, "digest": content.hexdigest()}
            write_record(record, entry)
    return size, content.hexdigest()


def write_record(file: Path, content: object) -> None:
    """Writes a small file of JSON in one step, so that no process reads half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def stamp(status: os.stat_result) -> list[int]:
    """Size, times and inode of a file: at least one of them changes whenever the file does. No
    program can set the third number, the ctime."""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
