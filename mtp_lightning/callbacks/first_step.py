"""Looks at the first step for modules that do not learn, or that no checkpoint can continue."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

log = logging.getLogger(__name__)


class FirstStep(pl.Callback):
    """Warns once, after the first step with all depths, of parameters without a gradient and of
    draws from PyTorch's own generator."""

    def __init__(self) -> None:
        self._done = False
        self._random_state: Tensor | None = None
        self._idle: list[str] = []
        self._draws = False

    def on_train_batch_start(self, *_: Any) -> None:
        self._random_state = None if self._done else torch.get_rng_state()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._random_state is not None:
            named = pl_module.named_parameters()
            self._idle = [name for name, p in named if p.requires_grad and p.grad is None]
            self._draws = not torch.equal(self._random_state, torch.get_rng_state())

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, *_: Any
    ) -> None:
        if self._done or not all(outputs["computed"][1:]):
            return
        self._done = True
        if self._idle:
            name, *others = (name.removeprefix("model.") for name in self._idle)
            more = f" and {len(others)} more" if others else ""
            log.warning("No loss depends on %s%s, which no step changes.", name, more)
        if self._draws:
            log.warning(
                "A module draws from PyTorch's own generator, which neither the seed nor a "
                "checkpoint sets: this run cannot be repeated or resumed exactly."
            )
