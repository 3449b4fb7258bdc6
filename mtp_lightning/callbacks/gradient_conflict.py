"""Norms and cosines of the depths' gradients: whether they agree with the main prediction's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.objective.balance.gradients import (
    require_measurable,
    shared_parameters,
    task_gradients,
)
from mtp_lightning.objective.plan import depths_of


@dataclass(eq=False)
class GradientConflict(RunCallback):
    """Logs ``|g_k|`` and ``cos(g_0, g_k)``, where ``g_k`` is the gradient of the unscaled ``L_k``.

    ``grad/norm_depth_k`` (k = 0 .. D) and ``grad/cosine_depth_k`` (k = 1 .. D) are for the last
    block of the shared trunk; ``grad/embedding_norm_depth_k`` and
    ``grad/embedding_cosine_depth_k`` are for the embedding as an input of trunk and modules,
    without a tied head's share. They cover all ranks and micro-batches of the optimizer step,
    before clipping. Depths with a schedule weight of 0 are left out.

    Training is unchanged, and no state is kept. A measurement costs about as much as the step
    itself (:func:`task_gradients`), and memory for D + 1 vectors of the size of the block and the
    embedding. At the default of one step in 50 that is a few percent of a run. All measurements are
    logged.
    """

    takes_gradients = "callbacks=gradient_conflict"
    every_n_steps: int = 50
    _measured: dict[str, Any] = field(default_factory=dict, init=False)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Refuses a model with nothing to measure."""
        model, objective = pl_module.model, pl_module.step.objective
        if model.depth:
            require_measurable(model.config, objective, setting=self.takes_gradients)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: WindowBatch, batch_idx: int
    ) -> None:
        step, self._measured = trainer.global_step, {}
        if (step + 1) % self.every_n_steps:
            return
        model, objective = pl_module.model, pl_module.step.objective
        plan = pl_module.step.plan(batch, pl_module.progress(step))
        groups = {
            "last_block": shared_parameters(model, "last_block"),
            "embedding": [model.trunk.embedding.weight],
        }
        with trainer.precision_plugin.train_step_context():
            by_group = task_gradients(model, objective, plan, depths_of(plan.lambdas), groups)
        for group, gradients in by_group.items():
            self._measured |= gradients.log_values(group)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        """Logs here, since other callbacks may log the step before at this one's start."""
        pl_module.log_here(self._measured, trainer.global_step, always=True)
