"""Writes a sharded checkpoint (``shard_files.py``): every process writes its own shards while
training continues.

The shards are copied to the CPU at the saved step, and a thread writes them to the disk. When all
processes have written theirs, the first process gives the index its name. The processes
communicate only at points that all of them pass, so that no thread waits for another process.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from mtp_lightning.distributed import shard_files
from mtp_lightning.distributed.sharding import outlined_parts, own_parts, place_in
from mtp_lightning.run import checkpoints
from mtp_lightning.run.layout import SHARDS
from mtp_lightning.system import sync_folder

_INDEX = "index"
_FAILED, _AT_WORK, _DONE = -1, 0, 1


class ShardWriting:
    """One process's part in writing a checkpoint of a model that is sharded on ``mesh``.

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
        large = [key for key in shard_files.KINDS if key in checkpoint]
        if first_copy:
            for key in large:
                file = shard_files.part_file(self._folder, key, part, parts)
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
            shard_files.sweep(self._target.parent)
        dist.barrier(group=self._group)  # the checkpoint now exists for every process
        return True
