"""``trainer.strategy=fsdp``: Lightning's strategy for sharded models, with this project's files.

A small checkpoint is the same plain file that a single process writes: the first process gathers
and writes it, and reads it and distributes the shards. Of a large checkpoint, each process writes
and reads its own shards (``shard_files.py``). Any number of processes can continue from either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from mtp_lightning.distributed import shard_files
from mtp_lightning.distributed.sharding import (
    build_mesh,
    bytes_of,
    gathered,
    local,
    outlined,
    own_rows,
    spread,
)
from mtp_lightning.errors import UserError
from mtp_lightning.run import checkpoints

# Size of a checkpoint, in GB, above which each process writes its own shards.
_SPLIT_GB = 16.0


def choose_strategy(trainer: Mapping[str, Any], *, may_skip: bool) -> str | Strategy:
    """See :func:`mtp_lightning.processes.strategy`."""
    if trainer["strategy"] == "fsdp":
        split_gb = trainer["split_checkpoint_gb"]
        split_gb = _SPLIT_GB if split_gb is None else split_gb
        return ShardedStrategy(trainer["shard_size"], split_gb=split_gb)
    if trainer["strategy"] == "ddp" or trainer["num_nodes"] > 1:
        return "ddp_find_unused_parameters_true" if may_skip else "ddp"
    return "auto"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 on a mesh of (shards) or of (replicas, shards). ``shard_size`` processes (None for all)
    share one replica. If a checkpoint is larger than ``split_gb`` (10^9 bytes), each process writes
    its shards."""

    def __init__(self, shard_size: int | None, *, split_gb: float) -> None:
        super().__init__(save_distributed_checkpoint=False)
        self.shard_size = shard_size
        self.split_gb = split_gb
        # See :class:`~mtp_lightning.callbacks.base.WritesBeside`.
        self.in_parts = self.writes_beside = False
        self._writing: shard_files.ShardWriting | None = None
        self._cpu_group: Any = None

    def setup_environment(self) -> None:
        """Connect the processes, and build their mesh. Their number must be a multiple of
        ``shard_size``."""
        assert self.lightning_module is not None
        # Lightning's setup_environment would build a mesh for tensor parallelism.
        self._setup_distributed()
        if self.shard_size is not None and self.world_size % self.shard_size:
            raise UserError(
                f"trainer.shard_size={self.shard_size} does not divide the {self.world_size} "
                "processes: every replica of the model needs that many."
            )
        if self._device_mesh is None:
            self._device_mesh = build_mesh(self.root_device.type, self.world_size, self.shard_size)
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The sharded weights. :meth:`save_checkpoint` gathers them if it writes one file."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The sharded state of an optimizer, with parameters numbered as in a plain checkpoint."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write one file or, if it would be large, shards."""
        self.settled(wait=True)
        sharded = {key: checkpoint[key] for key in shard_files.KINDS if key in checkpoint}
        self.in_parts = bytes_of(sharded) > self.split_gb * 1e9
        if not self.in_parts:
            whole = checkpoint | {key: gathered(value) for key, value in sharded.items()}
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(whole, filepath, storage_options)
            return
        assert self._device_mesh is not None
        if self._cpu_group is None:
            self._cpu_group = dist.new_group(backend="gloo")
        self._writing = shard_files.ShardWriting(
            checkpoint, Path(filepath), self._device_mesh, self._cpu_group
        )
        self.settled(wait=not self.writes_beside)

    def settled(self, *, wait: bool) -> bool:
        """Whether the newest checkpoint is complete. Raises an OSError if it could not be written.
        All processes must call this together."""
        if self._writing is not None:
            writing, self._writing = self._writing, None  # stays None if `ended` raises
            if not writing.ended(wait=wait):
                self._writing = writing
        return self._writing is None

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint. The first process reads a single file, and the others get its sharded
        tensors without content. Of a sharded checkpoint, each process reads what it needs."""
        index = checkpoints.load(checkpoint_path, mapped=True)
        self.in_parts = checkpoints.is_sharded(index)
        if self.in_parts:
            return shard_files.opened(index, Path(checkpoint_path))
        content: list[Any] = [None]
        checkpoint: dict[str, Any] = {}
        if self.is_global_zero:
            checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
            large = {k: outlined(v) for k, v in checkpoint.items() if k in shard_files.KINDS}
            content = [checkpoint | large]
        dist.broadcast_object_list(content)
        return checkpoint or content[0]

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Distribute the weights over the processes; refuse other names than the model's."""
        assert self.lightning_module is not None
        weights, stored = self.lightning_module.state_dict(), checkpoint["state_dict"]
        if weights.keys() != stored.keys():
            names = ", ".join(sorted(weights.keys() ^ stored.keys()))
            raise UserError(f"The checkpoint's weights are not the model's: {names}.")
        with torch.no_grad():
            for name, tensor in weights.items():
                tensor.copy_(_own_shard(stored[name], tensor))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Distribute the optimizer's state over the processes. A tensor with a parameter's shape is
        sharded as the parameter is."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            sharded: dict[str, Any]
            if "param_groups" in state:
                sharded = _spread_state(state, optimizer)
            else:  # of an optimizer that combines several, by name
                parts = optimizer.optimizers  # type: ignore[attr-defined]
                sharded = {name: _spread_state(part, parts[name]) for name, part in state.items()}
            optimizer.load_state_dict(sharded)


def _spread_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        number: {key: _spread_entry(value, parameters[number]) for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}


def _spread_entry(value: Any, parameter: Tensor) -> Any:
    if not isinstance(value, Tensor | shard_files.Pieces):
        return value
    like = parameter if value.shape == parameter.shape else local(parameter).new_empty(0)
    return _own_shard(value, like)


def _own_shard(stored: Tensor | shard_files.Pieces, like: Tensor) -> Tensor:
    """This process's shard of a checkpoint's tensor."""
    if isinstance(stored, shard_files.Pieces):
        return own_rows(stored.rows, like)
    return spread(stored, like)
