"""The files of a sharded checkpoint: an index, and each process's rows of the sharded tensors.

    checkpoints/last.ckpt                                   the index
    checkpoints/parts/00000400-1f3a9c5e/weights-2-of-8.pt   process 2's rows of the weights
    checkpoints/parts/00000400-1f3a9c5e/optimizer-2-of-8.pt

All of them are plain files with checksums, as every checkpoint is. In the index, a sharded tensor
has a shape and no content (torch's device ``meta``), and the key ``parts`` names the folder and the
number of shards; ``sharding.rows_of`` gives the rows of shard i. The index gets its name when all
shards are on the disk, so that an unfinished save is never seen. `best.ckpt` and `previous.ckpt`
are links to an index.
"""

from __future__ import annotations

import os
import pickle
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_map_only, tree_map_with_path

from mtp_lightning.distributed.sharding import outlined_parts, own_parts, place_in, rows_of
from mtp_lightning.run import checkpoints
from mtp_lightning.run.checkpoints import damaged, is_sharded, without_content
from mtp_lightning.run.layout import SHARDS
from mtp_lightning.system import sync_folder

# The keys of a checkpoint that are sharded, and the names of their files.
KINDS = {"state_dict": "weights", "optimizer_states": "optimizer"}
# An index with more shards than this is damaged.
_MOST_SHARDS = 1 << 20
# The name of an index before its shards are on the disk.
_INDEX = "index"
_FAILED, _AT_WORK, _DONE = -1, 0, 1


class Pieces:
    """A tensor of the shape and dtype of ``outline`` in a number of shards, whose rows ``piece``
    reads when they are needed."""

    def __init__(self, outline: Tensor, parts: int, piece: Callable[[int], Tensor]) -> None:
        self.shape, self.dtype = outline.shape, outline.dtype
        self._parts, self._piece = parts, piece

    def rows(self, start: int, stop: int) -> Tensor:
        """Read a copy of the rows from ``start`` up to ``stop``; errors as for :func:`filled`."""
        shards = []
        size = max(1, -(-self.shape[0] // self._parts))
        for part in range(start // size, -(-stop // size)):
            first, end = rows_of(part, self._parts, self.shape[0])
            piece = self._piece(part)
            shards.append(piece[max(start, first) - first : min(stop, end) - first])
        return torch.cat(shards) if shards else torch.empty(0, *self.shape[1:], dtype=self.dtype)


def part_file(folder: Path, key: str, part: int, parts: int) -> Path:
    """The file with a shard's rows of the tensors under a checkpoint's key."""
    return folder / f"{KINDS[key]}-{part}-of-{parts}.pt"


def files_of(content: dict[str, Any], path: Path) -> Iterator[Path]:
    """Yield the files of the shards that belong to an index. A damaged index raises a
    :class:`UserError`."""
    if not is_sharded(content):
        return
    folder, parts = _described(content, path)
    for key in KINDS:
        if without_content(content.get(key)):
            yield from (part_file(folder, key, part, parts) for part in range(parts))


def opened(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a sharded checkpoint, given its index: sharded tensors become :class:`Pieces`, and
    others stay as they are. A damaged index raises a :class:`UserError`."""
    folder, parts = _described(content, path)
    read = cache(partial(_read, index=path))

    def pieces(where: tuple[Any, ...], outline: Any) -> Any:
        if not without_content(outline):
            return outline
        if outline.dim() == 0:
            raise damaged(path)
        top, *inner = where

        def piece(part: int) -> Tensor:
            file = part_file(folder, top.key, part, parts)
            value = read(file)
            try:
                for step in inner:
                    value = step.get(value)
            except (KeyError, IndexError, TypeError) as error:
                raise damaged(file) from error
            first, end = rows_of(part, parts, outline.shape[0])
            shape = (end - first, *outline.shape[1:])
            # An expanded tensor could be small in the file and fill the memory.
            if not (isinstance(value, Tensor) and value.shape == shape and value.is_contiguous()):
                raise damaged(file)
            return value

        return Pieces(outline, parts, piece)

    sharded = {key: value for key, value in content.items() if key in KINDS}
    whole = {key: value for key, value in content.items() if key != SHARDS}
    return whole | tree_map_with_path(pieces, sharded)


def filled(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a checkpoint with whole tensors, as if it had been written as one file.

    Raises:
        FileNotFoundError: a shard is missing.
        UserError: a shard is damaged, or the content of a tensor is missing.
    """
    if any(without_content(value) for key, value in content.items() if key not in KINDS):
        raise damaged(path)
    return tree_map_only(Pieces, lambda part: part.rows(0, part.shape[0]), opened(content, path))


def sweep(folder: Path) -> None:
    """Remove the shards of replaced checkpoints and of unfinished saves from a folder."""
    wanted: set[Path] = set()
    for index in folder.glob("*.ckpt"):
        try:
            content = torch.load(index, map_location="cpu", weights_only=True, mmap=True)
            wanted.update(files_of(content, index))
        except OSError:  # the disk is away for a moment, so the index may still need its shards
            return
        except Exception:  # a damaged index can make the reader raise anything
            continue
    for save in _listed(folder / SHARDS):
        for file in _listed(save):
            if file not in wanted:
                file.unlink(missing_ok=True)
        with suppress(OSError):  # it is not empty
            save.rmdir()
    with suppress(OSError):
        (folder / SHARDS).rmdir()


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _described(content: dict[str, Any], path: Path) -> tuple[Path, int]:
    """(the folder of the shards, their number)."""
    entry = content[SHARDS]
    is_entry = isinstance(entry, dict) and entry.keys() == {"folder", "parts"}
    if not is_entry or type(entry["parts"]) is not int or not 1 <= entry["parts"] <= _MOST_SHARDS:
        raise damaged(path)
    # A plain name, so that a stored file cannot point outside its folder.
    if not isinstance(entry["folder"], str) or not re.fullmatch(r"[0-9a-f-]+", entry["folder"]):
        raise damaged(path)
    return path.parent / SHARDS / entry["folder"], entry["parts"]


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


class ShardWriting:
    """One process's part in writing a checkpoint of a model that is sharded on ``mesh``.

    Every process writes its own shards while training continues: they are copied to the CPU at the
    saved step, and a thread writes them to the disk. When all processes have written theirs, the
    first process gives the index its name. The processes communicate only at points that all of
    them pass, so that no thread waits for another process.

    Args:
        checkpoint: the checkpoint, with the same content on every process except for the shards.
        target: the path of the index.
        group: a process group of all processes for CPU tensors.
    """

    def __init__(
        self, checkpoint: dict[str, Any], target: Path, mesh: DeviceMesh, group: dist.ProcessGroup
    ) -> None:
        self._target, self._group = target, group
        self._leads = dist.get_rank() == 0
        # A unique name, so that an index never mixes shards of different saves.
        name = [f"{checkpoint['global_step']:08d}-{uuid.uuid4().hex[:8]}"]
        dist.broadcast_object_list(name)
        self._folder = target.parent / SHARDS / name[0]
        part, parts, first_copy = place_in(mesh)
        self._contents: dict[Path, Any] = {}
        large = [key for key in KINDS if key in checkpoint]
        if first_copy:
            for key in large:
                file = part_file(self._folder, key, part, parts)
                self._contents[file] = own_parts(checkpoint[key])
        if self._leads:
            index = checkpoint | {key: outlined_parts(checkpoint[key]) for key in large}
            index[SHARDS] = {"folder": name[0], "parts": parts}
            checkpoints.save(index, self._folder / _INDEX)
        self._error: Exception | None = None
        self._thread = Thread(target=self._write)
        self._thread.start()

    def _write(self) -> None:
        try:
            while self._contents:
                file = next(iter(self._contents))
                checkpoints.save(self._contents[file], file)
                del self._contents[file]  # frees its memory
        except Exception as error:  # `ended` raises it, where the other processes learn of it too
            self._error = error
            self._contents.clear()

    def ended(self, *, wait: bool) -> bool:
        """Whether the checkpoint is complete. All processes must call this together.

        Raises:
            OSError: a process could not write its shards; all processes raise this.
        """
        if wait:
            self._thread.join()
        own_state = _AT_WORK if self._thread.is_alive() else _FAILED if self._error else _DONE
        state = torch.tensor(own_state)
        dist.all_reduce(state, dist.ReduceOp.MIN, group=self._group)
        if int(state) == _AT_WORK:
            return False
        if int(state) == _FAILED:
            self._thread.join()
            raise self._error or OSError(
                f"Another process could not write its part of the checkpoint {self._target}: its "
                "error message says why."
            )
        if self._leads:
            for folder in (self._folder, self._folder.parent):
                sync_folder(folder)
            os.replace(self._folder / _INDEX, self._target)
            sync_folder(self._target.parent)
            sweep(self._target.parent)
        dist.barrier(group=self._group)  # the checkpoint now exists for every process
        return True
