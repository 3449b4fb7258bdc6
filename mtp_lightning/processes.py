"""The processes that train one run: this one, or several that the part ``distributed/`` connects.

The rest of the code uses that part only through this file: :func:`find` returns the processes of a
run, and :func:`tensors` an object that knows where the tensors are. For a single process, both are
implemented here and the part is not imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning import parts
from mtp_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Environment variable for a process that Lightning starts: the decisions made before.
DECISIONS = "MTP_LIGHTNING_DECISIONS"


class Peers:
    """The processes that prepare one run together. This base class is a single process."""

    rank: int = 0  # of this process
    leads: bool = True  # whether it is the first one, and no other one has started it

    def broadcast(self, key: str, decide: Callable[[], Any]) -> Any:
        """Return the first process's decision in all processes. Only the first process calls
        ``decide``, which returns a value that JSON can hold; ``key`` names the decision."""
        return decide()

    def in_turn(self) -> AbstractContextManager[None]:
        """Run a block in the first process before the others, which then find its files."""
        return nullcontext()

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Refuse a number of processes that differs from the group ``trainer``."""

    def require_shared(self, folder: Path) -> None:
        """Refuse a run folder that some processes cannot see."""

    def watched(self, folder: Path) -> AbstractContextManager[None]:
        """End a block with an error if another process of the run has ended early."""
        return nullcontext()

    def handing_on(self, folder: Path) -> AbstractContextManager[None]:
        """During a block, hand the decisions to every process that is started."""
        return nullcontext()


class Tensors:
    """Access to a run's tensors. In this base class, this process has all of them whole."""

    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a tensor that may be sharded; all processes must call this together."""
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor."""
        return tensor

    def own_part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Shard a tensor, which every process has whole, in the same way as ``like``."""
        return tensor

    def lay_out(self, run: Any) -> None:
        """Shard the model of a LightningModule if its strategy shards models."""

    def whole_model(self, run: Any, *, everywhere: bool) -> Any:
        """The unsharded model of a LightningModule, for work of one process: in each process if
        ``everywhere``, otherwise in the first one only, and None in the others."""
        return run.model


_tensors = Tensors()


def tensors() -> Tensors:
    """The access to this process's tensors."""
    return _tensors


def attach(access: Tensors) -> None:
    """Set the access to tensors; the part calls this when it is imported."""
    global _tensors
    _tensors = access


def find(trainer: Mapping[str, Any] | None = None) -> Peers:
    """Connect to the processes of this run; its config group ``trainer`` is None before the config
    is composed.

    Raises:
        UserError: settings do not fit together, there are several processes without the part, or a
            process has ended.
    """
    setting = _asks_for_several(trainer)
    peers = parts.need("distributed", setting).find_peers() if setting else Peers()
    if trainer is not None:
        peers.check(trainer)
    return peers


def strategy(trainer: Mapping[str, Any], *, may_skip: bool) -> Any:
    """Lightning's strategy for the group ``trainer``: an object or a name. With ``may_skip``, some
    parameters get no gradient in some steps.

    Raises:
        UserError: there are several processes without the part.
    """
    if setting := _asks_for_several(trainer):
        return parts.need("distributed", setting).choose_strategy(trainer, may_skip=may_skip)
    return "auto"


def check(trainer: Mapping[str, Any]) -> None:
    """Refuse several devices without a strategy, and a setting of fsdp without fsdp."""
    name, devices = trainer["strategy"], trainer["devices"]
    if name == "auto" and devices not in (1, "1"):
        raise UserError(
            f"trainer.devices={devices} needs trainer.strategy=ddp (each has the whole model) or "
            "fsdp (each has a part of it): several devices train one model together."
        )
    for key in ("shard_size", "split_checkpoint_gb"):
        if trainer[key] is not None and name != "fsdp":
            raise UserError(
                f"trainer.{key}={trainer[key]} has no meaning for trainer.strategy={name}, whose "
                "processes have all of the model: set trainer.strategy=fsdp, or leave it null."
            )


def require_whole_gradients(trainer: Mapping[str, Any], what: str) -> None:
    """Refuse a sharded model for a method that needs the whole gradient of each task."""
    if trainer["strategy"] == "fsdp":
        raise UserError(
            f"{what} takes every task's gradient by itself, which trainer.strategy=fsdp has on no "
            "process as a whole: use trainer.strategy=ddp, or leave it out."
        )


def _asks_for_several(trainer: Mapping[str, Any] | None) -> str:
    """The setting or environment variable that asks for several processes; empty if none does."""
    if trainer is not None:
        for key, single in (("strategy", ("auto",)), ("num_nodes", (1, "1"))):
            if trainer[key] not in single:
                return f"trainer.{key}={trainer[key]}"
    env = os.environ
    for name in (DECISIONS, "TORCHELASTIC_RUN_ID", "NODE_RANK"):
        if name in env:
            return name
    for name in ("WORLD_SIZE", *(["SLURM_NTASKS"] if "SLURM_STEP_NUM_TASKS" in env else [])):
        if env.get(name, "1") != "1":
            return f"{name}={env[name]}"
    return ""
