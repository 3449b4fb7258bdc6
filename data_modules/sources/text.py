"""The user's own text: files, folders or globs of plain text, JSON lines and parquet."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_modules.sources.base import FileSource, decode_utf8, require_unicode
from data_modules.sources.packed import COMPRESSED, open_plain, parquet_column
from mtp_lightning.errors import UserError

log = logging.getLogger(__name__)

PACKED = (*COMPRESSED, ".parquet")
"""Suffixes of files whose text is not as long as the file."""
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class TextSource(FileSource):
    """Documents from files on disk.

    A plain file is one document. A ``.jsonl`` file holds one document per line, the string under
    ``field``, and a ``.parquet`` file one per row. Files that end in ``.gz`` or ``.zst`` are
    decompressed as they are read. A folder stands for all files below it, except hidden ones, empty
    ones and those that are not text; a glob stands for the files that match it, except empty ones,
    and then the folders. A log line counts what is left out. Files are taken in the order of
    ``paths``, sorted inside a folder or glob; a file named twice is read once.

    Args:
        paths: one path, folder or glob, or a list of them; ``~`` is expanded, and relative paths
            start at the current folder.
        field: name of the text field in JSON lines and parquet.
        val_paths: the same for the documents for validation; None if some of the others are.
        key: the config key of ``paths``, for messages.

    Raises:
        FileNotFoundError: from ``documents`` and ``fingerprint``, for a path that does not exist,
            or a glob or folder without a file.
        UserError: from these too, for an empty file, one that is not UTF-8 (with the byte offset),
            a line that is not a JSON object with that field, a damaged compressed file, or parquet
            or ``.zst`` without pyarrow.
    """

    name = "text"

    def __init__(
        self,
        paths: Paths,
        *,
        field: str = "text",
        val_paths: Paths | None = None,
        key: str = "data.paths",
    ) -> None:
        self.paths, self.field, self.key = path_list(paths, key), field, key
        if val_paths is not None:
            self.held_out = TextSource(val_paths, field=field, key="data.val_paths")

    @property
    def rules(self) -> tuple[object, ...]:
        held_out = () if self.held_out is None else (self.held_out.fingerprint(),)
        return ("text", self.field, *held_out)

    def require_unchanged(self) -> None:
        super().require_unchanged()
        if self.held_out is not None:
            self.held_out.require_unchanged()

    @cached_property
    def files(self) -> list[tuple[str, Path]]:
        # Read by the given path: the target of a link may have another suffix.
        unique: dict[Path, tuple[str, Path]] = {}
        for pattern in self.paths:
            for name, path in expand(pattern, self.key):
                if path.stat().st_size == 0:
                    raise UserError(f"{path} is empty: give text, or leave it out of {self.key}")
                if not _may_be_text(path):
                    log.warning("%s holds zero bytes, which no text has: is it UTF-16?", path)
                unique.setdefault(path.resolve(), (name, path))
        if isinstance(self.held_out, TextSource):
            validated = (path for _, path in self.held_out.files)
            if shared := unique.keys() & {path.resolve() for path in validated}:
                raise UserError(
                    f"{min(shared)} is in {self.key} and in {self.held_out.key}: validation must "
                    "not see what was trained on"
                )
        return list(unique.values())

    def documents(self) -> Iterator[str]:
        for _, path in self.files:
            unpacked = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
            kind = unpacked.suffix.lower()
            if kind == ".parquet" and unpacked != path:
                raise UserError(
                    f"{path} is parquet in another compression, which cannot be read: unpack it"
                )
            if kind == ".parquet":
                yield from parquet_column(path, self.field)
            elif kind == ".jsonl":
                yield from self._json_lines(path)
            else:
                yield _one_document(path)

    def _json_lines(self, path: Path) -> Iterator[str]:
        offset = 0
        with open_plain(path) as file:
            for number, line in enumerate(file, start=1):
                text = decode_utf8(line, str(path), offset=offset)
                offset += len(line)
                if not text.strip():
                    continue
                try:
                    row = json.loads(text.removeprefix("\ufeff"))  # which Windows puts first
                except (ValueError, RecursionError) as error:  # RecursionError: a nested list
                    raise UserError(
                        f"{path}, line {number}, is not JSON ({error}): fix or remove that line"
                    ) from None
                if not isinstance(row, dict) or not isinstance(row.get(self.field), str):
                    kinds = isinstance(row, dict) and {k: type(v).__name__ for k, v in row.items()}
                    other = ", or set data.field" if self.key == "data.paths" else ""
                    raise UserError(
                        f"{path}, line {number}, has no string under {self.field!r} "
                        f"(it has {kinds or type(row).__name__}): rename it{other}"
                    )
                if "\\u" in text:
                    require_unicode(row[self.field], f"{path}, line {number},")
                yield row[self.field]

    def total_bytes(self) -> int | None:
        packed = any(path.suffix.lower() in PACKED for _, path in self.files)
        others = 0 if self.held_out is None else self.held_out.total_bytes()
        return None if packed or others is None else (super().total_bytes() or 0) + others

    def summary(self) -> dict[str, Any]:
        facts = super().summary() | {"files": len(self.files), "paths": self.paths}
        return facts if self.held_out is None else facts | {"held_out": self.held_out.summary()}


def path_list(paths: Paths, key: str) -> list[str]:
    """Paths, folders and globs that a user set by a key, as a list; refuses anything else."""
    items: list[Any] = [paths]
    if isinstance(paths, Sequence) and not isinstance(paths, str):
        items = list(paths)
    if not items or not all(isinstance(p, str | os.PathLike) and str(p) for p in items):
        raise UserError(
            f"{key} must name a file, a folder or a glob, or a list of them, got {paths!r}"
        )
    return [os.fspath(path) for path in items]


def _may_be_text(path: Path) -> bool:
    """Whether a file is packed text, or begins without a byte 0, as Git tells text from others."""
    if path.suffix.lower() in PACKED:
        return True
    with path.open("rb") as file:
        beginning = file.read(8000)
    return bool(beginning) and b"\0" not in beginning


def expand(
    pattern: str, key: str = "data.paths", *, text_only: bool = True
) -> list[tuple[str, Path]]:
    """The files that a path, folder or glob stands for (see :class:`TextSource`), with names that
    do not depend on where they are.

    Args:
        key: the config key of the path, for messages.
        text_only: whether to leave out empty files, and those of a folder that are not text.

    Raises:
        FileNotFoundError: if there is no file.
    """
    path = Path(os.path.expanduser(pattern))  # unlike Path.expanduser, leaves an unknown ~name
    found = [path] if path.exists() else sorted(_found(path))
    empty = {p for p in found if text_only and p != path and p.is_file() and not p.stat().st_size}
    if empty:
        log.warning("%s: left out %d empty files", pattern, len(empty))
    names = {file: file.name for file in found if file.is_file() and file not in empty}
    around = set(found)  # ** matches the folders of a folder, too
    for folder in (path for path in found if path.is_dir() and around.isdisjoint(path.parents)):
        for name, file in _folder(folder, text_only):
            names.setdefault(file, name)
    if not names:
        why = "holds no file to read" if found else "does not exist"
        raise FileNotFoundError(f"{pattern} {why} (looked from {Path.cwd()}): check {key}")
    return [(name, file) for file, name in names.items()]


def _refuse(error: OSError) -> None:
    raise error


def _found(pattern: Path) -> set[Path]:
    """What a glob finds. Unlike that of :mod:`glob`, its ``**`` visits each folder once, although
    links may lead in circles."""
    if "**" not in pattern.parts:
        return set(map(Path, glob.glob(str(pattern))))
    at = pattern.parts.index("**")
    above, below = Path(*pattern.parts[:at]), Path(*pattern.parts[at + 1 :])
    ends = [below] if below.parts else [below, Path("*")]
    return {
        path
        for start in filter(Path.is_dir, _found(above))
        for folder, _ in _walk(start, hidden=False)
        for end in ends
        for path in _found(Path(glob.escape(str(folder))) / end)
    }


def _walk(folder: Path, *, hidden: bool) -> Iterator[tuple[Path, list[str]]]:
    """A folder and its subfolders, linked ones too, each once, and the names of their files.

    Raises:
        OSError: a subfolder cannot be read.
    """
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse):
        # The order decides the name of a folder that is linked twice.
        folders[:] = sorted(name for name in folders if hidden or not name.startswith("."))
        if (real := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(real)
        yield Path(root), names


def _folder(folder: Path, text_only: bool) -> list[tuple[str, Path]]:
    paths = (root / name for root, names in _walk(folder, hidden=True) for name in names)
    entries = [(path.relative_to(folder), path) for path in paths if path.is_file()]
    visible = [(r, path) for r, path in entries if not any(part[0] == "." for part in r.parts)]
    files = sorted((r.as_posix(), p) for r, p in visible if not text_only or _may_be_text(p))
    hidden, other = len(entries) - len(visible), len(visible) - len(files)
    if hidden or other:
        level = logging.WARNING if other else logging.INFO
        message = "%s: left out %d hidden files, and %d that are empty or of another kind"
        log.log(level, message, folder, hidden, other)
    return files


def _one_document(path: Path) -> str:
    """A file's text, compressed or not."""
    try:
        with open_plain(path) as file:
            return decode_utf8(file.read(), str(path)).removeprefix("\ufeff")  # of Windows
    except MemoryError:
        raise UserError(
            f"{path} is one document and larger than the memory: split it, for example into lines "
            "of .jsonl"
        ) from None
