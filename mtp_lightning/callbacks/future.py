"""Refuses a user's head or layer that reads tokens which decoding does not have yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.registry import is_own
from mtp_lightning.runtime import eval_mode

# Training batches before which it looks: modules may hide what they read while weights are zero.
_LOOKS = (0, 10)
# Largest difference, as a share of the largest state, that rounding may cause: experts multiply
# other rows together when a token changes.
_ROUNDING = 1e-3


class HiddenFuture(pl.Callback):
    """Checks models that have modules from outside of this project (the project's own are tested),
    in runs of one process. A depth that reads the future is trained on its own target."""

    def __init__(self) -> None:
        self._n_batches = 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any
    ) -> None:
        if self._n_batches in _LOOKS and trainer.world_size == 1:
            model = pl_module.model
            assert isinstance(model, MTPModel)
            kinds = {type(module) for module in model.modules()}
            if not all(is_own(kind) or kind.__module__.startswith("torch.") for kind in kinds):
                require_hidden_future(model, batch)
        self._n_batches += 1


def require_hidden_future(model: MTPModel, batch: WindowBatch) -> None:
    """Change one token in the middle of a window, and compare the states that must not see it.

    Raises:
        UserError: a state of depth k at position i depends on a token after ``i + ahead(k)``.
    """
    if model.config.mtp.answers_at_once:
        return
    window = replace(batch.map(lambda field: field[:1]), key=None)
    position = window.seq_len // 2
    token = (window.tokens[:, position] + 1) % model.config.trunk.vocab_size
    changed = window.tokens.clone()
    changed[:, position] = token
    with torch.no_grad(), eval_mode(model):
        before, after = model(window), model(replace(window, tokens=changed))
    for k, states in before.items():
        hidden = max(position - model.mtp.ahead(k), 0)
        changes = (states - after[k])[0, :hidden].abs().amax(-1)
        seeing = (changes > _ROUNDING * states.abs().max()).nonzero()
        if len(seeing):
            name = f"depth {k} of mtp={model.config.mtp.variant}" if k else "the trunk"
            raise UserError(
                f"{name} at position {int(seeing[0])} reads the token at position {position}, "
                "which decoding does not have yet, so that its loss is too low: position i may "
                f"read tokens up to i + {model.mtp.ahead(k)}."
            )
