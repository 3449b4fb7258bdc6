"""Keeps a run that Lightning's EarlyStopping has ended from training on."""

from __future__ import annotations

import lightning.pytorch as pl


class EndedEarly(pl.Callback):
    """Ends a run that is started again after ``callbacks=early_stopping`` has ended it, unless
    ``patience`` is larger now.

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
