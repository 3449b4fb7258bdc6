"""Answers a task's questions at each validation, and checks the answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.model import MTPModel


@dataclass(eq=False)
class ExactMatch(RunCallback):
    """Logs ``val/exact_match``, the share of right answers of plain greedy decoding, the baselines
    (``val/chance``, ``val/seen``, ``val/trivial``), the other values of :class:`AnswerRates`, and
    the task's own measures, on the validation examples; for each out-of-distribution set as
    ``val/SET/..``. On text it does nothing.
    """

    batch_size: int = 256

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Decodes, checks and logs; every process does its share."""
        sets = trainer.datamodule.answer_sets  # type: ignore[attr-defined]
        if not sets:
            return
        model = pl_module.whole_model(everywhere=True)
        rank, world = trainer.global_rank, trainer.world_size
        self.newest = answer_all(model, sets, batch_size=self.batch_size, rank=rank, world=world)
        pl_module.log_dict(self.newest, rank_zero_only=True)

    def shown(self) -> str:
        share = self.newest.get("val/exact_match")
        return "" if share is None else f"right {share:.0%}"


def answer_all(
    model: MTPModel,
    sets: Mapping[str, Any],
    *,
    batch_size: int = 256,
    rank: int = 0,
    world: int = 1,
) -> dict[str, float]:
    """Rates and measures of every set, by log tag, over all ranks.

    Args:
        model: a model in evaluation mode.
        sets: a task's ``AnswerSet`` by name; "" is the validation set itself.
        batch_size: examples decoded together.
        rank: rank of this process among ``world``; it answers every ``world``-th example.
    """
    from mtp_lightning.decoding.answers import ModelOutputs
    from mtp_lightning.metrics.answers import AnswerRates

    device = model.head.weight.device
    values: dict[str, float] = {}
    for name, examples in sets.items():
        rates = AnswerRates(examples.n_positions, examples.group_names).to(device)
        measures = [m.to(device) for m in examples.measures(model.config.trunk.d_model)]
        indices = np.arange(rank, len(examples), world)
        for start in range(0, len(indices), batch_size):
            numbers = indices[start : start + batch_size]
            batch = examples.batch(numbers).to(device)
            width = batch.tokens.shape[1]
            outputs = ModelOutputs(model, batch, partial(examples.uniforms, numbers, width))
            right_B = examples.right(numbers, outputs.greedy_BW).to(device)
            positions = (p.to(device) for p in examples.answer_positions(numbers, width))
            rates.update(right_B, outputs.greedy_BW, outputs.forced_BW, batch.tokens, *positions)
            for measure in measures:
                measure.update(numbers, outputs)
        set_values = {**rates.compute(), **examples.baselines}
        for measure in measures:
            set_values |= measure.compute()
        prefix = f"val/{name}/" if name else "val/"
        values |= {f"{prefix}{key}": value for key, value in set_values.items()}
    return values
