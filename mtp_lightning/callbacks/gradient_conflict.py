"""Whether the depths pull the trunk where the main prediction pulls it: norms and cosines."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from data_modules.windows import WindowBatch
from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.model import MTPModel
from mtp_lightning.objective.balance.base import depths_of
from mtp_lightning.objective.balance.gradients import require_trunk_gradients, shared_parameters
from mtp_lightning.settings import require_whole


class GradientConflict(RunCallback):
    """Logs ``|g_k|`` and ``cos(g_0, g_k)``, ``g_k`` being the gradient of the unscaled ``L_k``.

    ``grad/norm_depth_k`` (k = 0 .. D) and ``grad/cosine_depth_k`` (k = 1 .. D) on the last block of
    the shared trunk; ``grad/embedding_norm_depth_k`` and ``grad/embedding_cosine_depth_k`` on the
    embedding, of its use as an input by trunk and modules: a tied head's share is left out. Over
    all ranks and micro-batches of the optimizer step, before clipping. Depths that the schedule
    gives weight 0 are left out.

    It changes nothing in training, and keeps no state. A step that measures costs about as much
    again as the step itself: a forward pass of trunk and depths, one backward pass for every task
    through its modules and the whole trunk, two products with the head; and memory for D + 1
    vectors of the block's and the embedding's size. With the default of one step in 50 that is a
    few percent of a run.

    Args:
        every_n_steps: optimizer steps between two measurements; all of them are logged.

    Raises:
        UserError: it is no whole number of at least 1.
    """

    takes_gradients = "callbacks=gradient_conflict"

    def __init__(self, every_n_steps: int = 50) -> None:
        key = "callbacks.gradient_conflict.every_n_steps"
        self.every_n_steps = require_whole(key, every_n_steps, least=1)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a model without anything to measure.

        Raises:
            UserError: no depth reaches the trunk.
        """
        model = pl_module.model
        assert isinstance(model, MTPModel)
        if model.depth:
            require_trunk_gradients(model.config, what="callbacks=gradient_conflict")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the step that comes, when it is time."""
        assert isinstance(batch, WindowBatch)
        module: Any = pl_module  # the project's own, which is not known in this room
        step = trainer.global_step
        if (step + 1) % self.every_n_steps:
            return
        model = module.model
        plan = module.step.plan(batch, module.progress(step))
        groups = {
            "last_block": shared_parameters(model, "last_block"),
            "embedding": [model.trunk.embedding.weight],
        }
        with trainer.precision_plugin.train_step_context():
            measured = plan.task_gradients(model, depths_of(plan.base), groups)
        for group, gradients in measured.items():
            module.log_here(gradients.log_values(group), step + 1, always=True)
