"""A sharded checkpoint: an index, and beside it the rows that each process had of large tensors.

    checkpoints/last.ckpt                                   the index
    checkpoints/parts/00000400-1f3a9c5e/weights-2-of-8.pt   rows of the weights that process 2 had
    checkpoints/parts/00000400-1f3a9c5e/optimizer-2-of-8.pt

Each is a plain file as every checkpoint is, checksums and all. In the index the sharded tensors
have a shape and no content (torch's device ``meta``), and its key ``parts`` names their folder and
the number of shards; ``sharding.rows_of`` gives the rows of shard i. The index gets its name when
all shards are on the disk: a save that was not finished is never seen, and `best.ckpt` and
`previous.ckpt` are links to an index.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtp_lightning.distributed.sharding import rows_of
from mtp_lightning.run.checkpoints import damaged, is_sharded, without_content
from mtp_lightning.run.layout import SHARDS

# What is in parts, by its key in a checkpoint, and what its files are called.
KINDS = {"state_dict": "weights", "optimizer_states": "optimizer"}
# More than any machine has processes: an index that says so lies.
_MOST_SHARDS = 1 << 20


class Pieces:
    """A tensor of which every part has some rows, read when they are asked for.

    Args:
        outline: its shape and type.
        parts: how many it is cut into.
        piece: gives one of them.
    """

    def __init__(self, outline: Tensor, parts: int, piece: Callable[[int], Tensor]) -> None:
        self.shape, self.dtype = outline.shape, outline.dtype
        self._parts, self._piece = parts, piece

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows from ``start`` up to ``stop``, in memory of their own.

        Raises:
            FileNotFoundError: a part that they are in is not there.
            UserError: it is damaged, or something else.
        """
        found = []
        size = max(1, -(-self.shape[0] // self._parts))
        for part in range(start // size, -(-stop // size)):
            first, end = rows_of(part, self._parts, self.shape[0])
            piece = self._piece(part)
            found.append(piece[max(start, first) - first : min(stop, end) - first])
        return torch.cat(found) if found else torch.empty(0, *self.shape[1:], dtype=self.dtype)


def part_file(folder: Path, key: str, part: int, parts: int) -> Path:
    """Where a part's rows of the tensors under a checkpoint's key are."""
    return folder / f"{KINDS[key]}-{part}-of-{parts}.pt"


def files_of(
    content: dict[str, Any], path: Path, *, keys: Collection[str] = tuple(KINDS)
) -> Iterator[Path]:
    """The files that belong to an index.

    Args:
        content: of the index.
        path: its own file.
        keys: of what; what the index does not have in parts has none.

    Raises:
        UserError: it does not say where they are.
    """
    if not is_sharded(content):
        return
    folder, parts = _described(content, path)
    for key in KINDS:
        if key in keys and without_content(content.get(key)):
            yield from (part_file(folder, key, part, parts) for part in range(parts))


def opened(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors in parts are :class:`Pieces`; one that has none as it is.

    Args:
        content: of its index.
        path: its own file.

    Raises:
        UserError: it does not say where they are.
    """
    if not is_sharded(content):
        return content
    folder, parts = _described(content, path)

    @cache
    def part_of(key: str, part: int) -> Any:
        return _read(part_file(folder, key, part, parts), path)

    def pieces(outline: Tensor, where: tuple[Any, ...]) -> Pieces:
        if outline.dim() == 0:
            raise damaged(path)

        def piece(part: int) -> Tensor:
            key, *inner = where
            found = part_of(key, part)
            try:
                for step in inner:
                    found = found[step]
            except (KeyError, IndexError, TypeError) as error:
                raise damaged(part_file(folder, key, part, parts)) from error
            first, end = rows_of(part, parts, outline.shape[0])
            shape = (end - first, *outline.shape[1:])
            # Contiguous: one number repeated could take all memory.
            if not (isinstance(found, Tensor) and found.shape == shape and found.is_contiguous()):
                raise damaged(part_file(folder, key, part, parts))
            return found

        return Pieces(outline, parts, piece)

    return {
        key: _with_pieces(value, pieces, (key,)) if key in KINDS else value
        for key, value in content.items()
        if key != SHARDS
    }


def filled(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """A checkpoint whose tensors are whole, as if it had been written as one file.

    Args:
        content: of its index.
        path: its own file.

    Raises:
        FileNotFoundError: a shard is not there.
        UserError: a shard is damaged, or a tensor's content is nowhere.
    """
    if any(without_content(value) for key, value in content.items() if key not in KINDS):
        raise damaged(path)
    return _whole(opened(content, path))


def sweep(folder: Path) -> None:
    """Remove the parts that belong to no checkpoint of a folder: of those that were replaced, and
    of saves that were not finished."""
    if not (folder / SHARDS).is_dir():
        return
    wanted: set[Path] = set()
    for index in folder.glob("*.ckpt"):
        try:
            content = torch.load(index, map_location="cpu", weights_only=True, mmap=True)
            wanted.update(files_of(content, index))
        except OSError:  # a disk that is away for a moment: what the index has, nobody knows
            return
        except Exception:  # whatever a damaged one makes the reader raise
            continue
    for save in _listed(folder / SHARDS):
        for file in _listed(save):
            if file not in wanted:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # what is wanted is in it
            save.rmdir()
    with suppress(OSError):
        (folder / SHARDS).rmdir()


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _described(content: dict[str, Any], path: Path) -> tuple[Path, int]:
    """(the folder of the parts, how many)."""
    said = content[SHARDS]
    named = isinstance(said, dict) and said.keys() == {"folder", "parts"}
    if not named or type(said["parts"]) is not int or not 1 <= said["parts"] <= _MOST_SHARDS:
        raise damaged(path)
    # A name and no path: nothing of a file leads out of its folder.
    if not isinstance(said["folder"], str) or not re.fullmatch(r"[0-9a-f-]+", said["folder"]):
        raise damaged(path)
    return path.parent / SHARDS / said["folder"], said["parts"]


def _read(file: Path, index: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(
            f"The checkpoint {index} is in parts, and {file} is not there: copy the folder "
            f"{SHARDS}/ along with it, and keep its name."
        )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, RecursionError) as error:
        raise damaged(file) from error


def _with_pieces(
    value: Any, pieces: Callable[[Tensor, tuple[Any, ...]], Pieces], where: tuple[Any, ...]
) -> Any:
    if isinstance(value, dict):
        return {key: _with_pieces(v, pieces, (*where, key)) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_pieces(v, pieces, (*where, i)) for i, v in enumerate(value))
    return pieces(value, where) if without_content(value) else value


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_whole(entry) for entry in value)
    return value.rows(0, value.shape[0]) if isinstance(value, Pieces) else value
