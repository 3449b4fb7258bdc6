"""Checks what Lightning's EarlyStopping monitors, and keeps an ended run from training on."""

from __future__ import annotations

import lightning.pytorch as pl
import torch

from mtp_lightning.callbacks.base import monitored


class EndedEarly(pl.Callback):
    """Gives EarlyStopping, which comes later, its value in every process, and ends a run that is
    started again after ``callbacks=early_stopping`` has ended it, unless ``patience`` is larger.

    EarlyStopping itself trains such a run until its next validation, and takes the former patience
    from the checkpoint.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remembers the settings, before the checkpoint replaces them."""
        self._patience = [rule.patience for rule in trainer.early_stopping_callbacks]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops a run that has no patience left."""
        for rule, patience in zip(trainer.early_stopping_callbacks, self._patience, strict=True):
            rule.patience = patience
            trainer.should_stop = trainer.should_stop or rule.wait_count >= patience

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a value that the validation did not log."""
        for rule in trainer.early_stopping_callbacks if trainer.state.fn == "fit" else ():
            if rule.strict:
                value = torch.tensor(monitored(trainer, "callbacks.early_stopping", rule.monitor))
                trainer.callback_metrics.setdefault(rule.monitor, value)
