"""Stops a run whose loss or weights are not finite, before it writes a checkpoint of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mtp_lightning import processes
from mtp_lightning.callbacks.base import RunCallback, run_callbacks
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.errors import UserError
from mtp_lightning.run.checkpoints import stored_step


@dataclass(eq=False)
class NanGuard(RunCallback):
    """Raises a UserError that names the step, the depths and the last good checkpoint.

    It reads the training step's outputs: `losses`, a tensor [D+1] of unscaled per-depth means,
    `computed`, D+1 bool that say which were computed, and `loss`. Reading a loss waits for
    the device, so on a GPU the steps are kept and checked together every `every_n_steps`; the error
    still names the first bad one. On a CPU every step is checked. Before a checkpoint is written,
    the unchecked losses and all parameters are checked: a gradient that overflows spoils the
    weights one step before a loss shows it.

    With several processes `losses` must be the same on all of them, or one would stop alone.
    """

    every_n_steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pending: list[tuple[int, Tensor, list[bool]]] = []
        self._failure: str | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forgets an earlier fit."""
        self._pending, self._failure = [], None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        losses, total = outputs["losses"].detach(), outputs["loss"].detach()
        row = torch.cat([losses, total.reshape(1).to(losses)])
        self._pending.append((trainer.global_step, row, outputs["computed"]))
        if row.device.type == "cpu" or len(self._pending) >= self.every_n_steps:
            self._look(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._look(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuses to save values that are not finite; this runs before anything is written."""
        if self._failure is not None:
            raise UserError(self._failure)
        self._look(trainer)
        floating = [(name, p) for name, p in pl_module.named_parameters() if p.is_floating_point()]
        local = processes.tensors().local
        finite = torch.stack([torch.isfinite(local(p.detach())).all() for _, p in floating])
        if trainer.world_size > 1:  # no process may stop alone
            finite = trainer.strategy.reduce(finite.float(), reduce_op="min").bool()
        if not bool(finite.all()):
            bad = [name for (name, _), ok in zip(floating, finite.tolist(), strict=True) if not ok]
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            step = trainer.global_step
            self._fail(
                trainer, f"The parameter {bad[0]}{more} is not finite after optimizer step {step}"
            )

    def _look(self, trainer: pl.Trainer) -> None:
        pending, self._pending = self._pending, []
        if not pending:
            return
        # One copy, so that the device is waited for once.
        values = torch.stack([row for _, row, _ in pending]).float().cpu()
        if bool(torch.isfinite(values).all()):
            return
        for (step, _, computed), row in zip(pending, values, strict=True):
            *losses, total = row.tolist()
            bad = [k for k, loss in enumerate(losses) if computed[k] and not math.isfinite(loss)]
            if bad or not math.isfinite(total):
                terms = ", ".join(f"depth {k} ({losses[k]})" for k in bad) or f"the sum ({total})"
                self._fail(
                    trainer,
                    f"The training loss is not finite at optimizer step {step}: {terms}",
                    untrained=step == 1,
                )

    def _fail(self, trainer: pl.Trainer, problem: str, *, untrained: bool = False) -> None:
        """End the run; ``untrained``: the values were computed with the first weights."""
        remedy = "Lower the learning rate or clip gradients."
        if untrained:
            remedy = "No weight has changed yet, so look at the modules, the terms and the data."
        self._failure = f"{problem}; {self._last_good(trainer)} {remedy}"
        raise UserError(self._failure)

    @staticmethod
    def _last_good(trainer: pl.Trainer) -> str:
        for callback in run_callbacks(trainer):
            if isinstance(callback, Checkpoints) and callback.last_path.is_file():
                path = callback.last_path
                return f"the last good checkpoint is {path} (step {stored_step(path)})."
        return "no good checkpoint had been written."
