"""The base class of a run's callbacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from mtp_lightning.command_line.check_config import check_settings
from mtp_lightning.errors import UserError, suggestion


# Hooks that need an MTPModule type ``pl_module`` as Any: callbacks/ may not import module.py.
@dataclass(eq=False)
class RunCallback(Callback):
    """Lightning's hooks and four more of a run; the defaults do nothing.

    A callback is a dataclass of its settings. The comments of its file in conf/callbacks explain
    and limit them; a wrong setting raises a :class:`UserError`.

    Attributes:
        takes_gradients: the override that adds the callback, if it needs each task's gradient by
            itself, which no rank of a sharded model has; else empty.
        newest: what the callback measured at the newest validation, by log tag.
    """

    takes_gradients: ClassVar[str] = ""
    newest = cast(Mapping[str, float], MappingProxyType({}))  # untyped, so not a setting

    def __post_init__(self) -> None:
        check_settings(self, f"callbacks.{type(self).__module__.rpartition('.')[2]}")

    def paused(self) -> AbstractContextManager[None]:
        """A context of work other than training, such as writing a checkpoint."""
        return nullcontext()

    def shown(self) -> str:
        """A few words about the newest steps, for the progress bar."""
        return ""

    def summary(self) -> dict[str, Any]:
        """This callback's entries of ``summary.json``, once the run has ended."""
        return dict(self.newest)

    def on_run_end(self) -> None:
        """Called in the first process when a run has ended well, after its summary is stored."""


def run_callbacks(trainer: pl.Trainer) -> Iterator[RunCallback]:
    """The trainer's callbacks of this class."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return (callback for callback in callbacks if isinstance(callback, RunCallback))


def monitored(trainer: pl.Trainer, group: str, tag: str) -> float:
    """Return a logged value, in all processes that of the first one: some callbacks log only there.

    Raises:
        UserError: no validation logged the tag that ``group.monitor`` names.
    """
    values = trainer.callback_metrics
    value = trainer.strategy.broadcast(float(values[tag]) if tag in values else None)
    if value is None:
        problem = f"{group}.monitor={tag} was not logged by the validation"
        raise UserError(f"{problem}: {suggestion(tag, sorted(values))}")
    return float(value)


@runtime_checkable
class WritesBeside(Protocol):
    """A strategy that may still be writing a checkpoint when its save returns."""

    # Whether it may do so. The code that sets this must call ``settled``.
    writes_beside: bool
    # Whether the newest save is sharded, because the model is too large for one process.
    in_parts: bool

    def settled(self, *, wait: bool) -> bool:
        """Whether the newest save is on disk under its name; all processes call this together."""
