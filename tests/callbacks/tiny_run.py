"""A tiny run for the tests of callbacks: two "depths", manual optimization, a resumable loader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from mtp_lightning.callbacks.checkpoints import AtomicCheckpointIO
from mtp_lightning.callbacks.termination import stop_together


class Batches:
    """Endless seeded batches; the order is a function of the consumed count."""

    def __init__(self, count: int = 1000) -> None:
        self.count = count
        self.position = 0

    def __iter__(self) -> Iterator[Tensor]:
        # Lightning counts to the length and does not exhaust the iterator
        if self.position >= self.count:
            self.position = 0
        while self.position < self.count:
            generator = torch.Generator().manual_seed(self.position)
            self.position += 1
            yield torch.randn(4, 3, generator=generator)

    def __len__(self) -> int:
        return self.count

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


class TinyModule(pl.LightningModule):
    """Learns the mean of a row; ``at_step(module, step)`` is called at every step, from 1."""

    def __init__(self, at_step: Callable[[TinyModule, int], None] | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 2)
        self.at_step = at_step
        self.losses: dict[int, list[float]] = {}
        self.val_steps: list[int] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.05)

    def _losses(self, batch: Tensor) -> Tensor:
        return ((self.layer(batch) - batch.mean(1, keepdim=True)) ** 2).mean(0)

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        step = self.global_step + 1
        losses = self._losses(batch)
        loss = losses[0] + 0.3 * losses[1]
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.losses[step] = losses.tolist()
        self.log("train/loss", loss, on_step=True)
        for k in range(2):
            self.log(f"train/loss_depth_{k}", losses[k], on_step=True)
        if self.at_step is not None:
            self.at_step(self, step)
        return {
            "loss": loss,
            "losses": losses.detach(),
            "computed": [True, True],
            "factors": [0.3],
            "tokens": 100,
            "flops": 1e6,
        }

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        losses = self._losses(batch)
        for k in range(2):
            self.log(f"val/loss_depth_{k}", losses[k], batch_size=len(batch))

    def on_validation_end(self) -> None:
        self.val_steps.append(self.global_step)


def fit(
    module: TinyModule,
    callbacks: list[pl.Callback],
    *,
    max_steps: int = 12,
    val_every: int = 4,
    ckpt_path: Path | None = None,
    loggers: list[Any] | None = None,
    epoch_steps: int = 1000,
) -> None:
    """Train on the CPU in steps, as the real runs do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about workers and the like
        trainer = pl.Trainer(
            max_steps=max_steps,
            max_epochs=-1,
            val_check_interval=val_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            accelerator="cpu",
            devices=1,
            log_every_n_steps=1,
            logger=loggers or False,
            callbacks=callbacks,
            plugins=[AtomicCheckpointIO()],
            # Lightning would add one of its own, which writes to the working directory.
            enable_checkpointing=any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
            enable_model_summary=False,
            enable_progress_bar=any(isinstance(c, pl.callbacks.ProgressBar) for c in callbacks),
        )
        stop_together(trainer)
        # no state: every validation sees the same batches
        validation = torch.utils.data.DataLoader(list(Batches(3)), batch_size=None)
        trainer.fit(module, Batches(epoch_steps), validation, ckpt_path=ckpt_path)
