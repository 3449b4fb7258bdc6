"""The processes that train one run: this one, or several that the part ``distributed/`` joins.

This is the part's one door. The core asks :func:`find` with whom a run is prepared, and
:func:`tensors` where its tensors are. For one process both answers are here, and the part is not
imported.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtp_lightning import parts
from mtp_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# In the environment of a process that Lightning has started: what was decided before.
TOLD = "MTP_LIGHTNING_TOLD"
_STRATEGIES = ("auto", "ddp", "fsdp")


class Peers:
    """The processes that prepare one run together: this one alone.

    Attributes:
        rank: of this process.
        leads: whether it is the first of all; a process that another one has started is not.
    """

    rank: int = 0
    leads: bool = True

    def told(self, key: str, decide: Callable[[], Any]) -> Any:
        """What the first process decides, the same in all of them.

        Args:
            key: of the decision.
            decide: called in the first process alone; gives what JSON can hold.
        """
        return decide()

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that the first process goes through before the others: what it leaves on the
        disk, they find."""
        yield

    def check(self, trainer: Mapping[str, Any]) -> None:
        """Refuse another number of processes than the group ``trainer`` asks for."""

    def require_shared(self, folder: Path) -> None:
        """Refuse a run folder that not all processes see."""

    @contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """A block that ends with a sentence where another process of the run has gone."""
        yield

    @contextmanager
    def handing_on(self, folder: Path) -> Iterator[None]:
        """A block that may start further processes, which are then told what was decided."""
        yield


class Tensors:
    """Where a run's tensors are: whole, in this process."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of which each process may have a shard; all processes must ask."""
        return tensor

    def local(self, tensor: Tensor) -> Tensor:
        """This process's shard of a tensor."""
        return tensor

    def own_part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """A tensor that every process has, sharded as ``like`` is."""
        return tensor

    def lay_out(self, run: Any) -> None:
        """Shard the model of a LightningModule, where its strategy asks for that."""

    def whole_model(self, run: Any, *, everywhere: bool) -> Any:
        """The model of a LightningModule, for what one process does by itself.

        Args:
            run: the module.
            everywhere: whether each process wants it; else it is None on all but the first.
        """
        return run.model


_tensors = Tensors()


def tensors() -> Tensors:
    """Where the tensors of this process's model are."""
    return _tensors


def attach(found: Tensors) -> None:
    """What the part does when it is imported."""
    global _tensors
    _tensors = found


def find(trainer: Mapping[str, Any] | None = None) -> Peers:
    """The processes of this run, connected.

    Args:
        trainer: the group of the config; None before there is one.

    Raises:
        UserError: settings that do not go together, several processes without the part, or a
            process that has gone.
    """
    if trainer is not None:
        check(trainer)
    asked = _asks_for_several(trainer)
    peers = parts.need("distributed", asked).find_peers() if asked else Peers()
    if trainer is not None:
        peers.check(trainer)
    return peers


def strategy(trainer: Mapping[str, Any], *, may_skip: bool) -> Any:
    """What Lightning calls a strategy, of the group ``trainer``.

    Args:
        trainer: the group.
        may_skip: whether some parameters get no gradient in some steps.

    Raises:
        UserError: as :func:`check`, or several processes without the part.
    """
    check(trainer)
    if asked := _asks_for_several(trainer):
        return parts.need("distributed", asked).choose_strategy(trainer, may_skip=may_skip)
    return "auto"


def check(trainer: Mapping[str, Any]) -> None:
    """Refuse settings of processes that do not go together.

    Raises:
        UserError: an unknown strategy, several devices without one, or a setting of fsdp without
            fsdp.
    """
    name, devices = trainer["strategy"], trainer["devices"]
    if name not in _STRATEGIES:
        known = ", ".join(_STRATEGIES)
        raise UserError(f"trainer.strategy={name} is not supported: choose one of {known}.")
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
    """Refuse a sharded model to what takes the gradients of one task alone.

    Raises:
        UserError: the model is to be sharded.
    """
    if trainer["strategy"] == "fsdp":
        raise UserError(
            f"{what} takes every task's gradient by itself, which trainer.strategy=fsdp has on no "
            "process as a whole: use trainer.strategy=ddp, or leave it out."
        )


def _asks_for_several(trainer: Mapping[str, Any] | None) -> str:
    """What asks for more than this process, as a person would type it; empty if nothing does."""
    if trainer is not None:
        for key, alone in (("strategy", ("auto",)), ("num_nodes", (1, "1"))):
            if trainer[key] not in alone:
                return f"trainer.{key}={trainer[key]}"
    env = os.environ
    for name in (TOLD, "TORCHELASTIC_RUN_ID", "NODE_RANK"):
        if name in env:
            return name
    for name in ("WORLD_SIZE", *(["SLURM_NTASKS"] if "SLURM_STEP_NUM_TASKS" in env else [])):
        if env.get(name, "1") != "1":
            return f"{name}={env[name]}"
    return ""
