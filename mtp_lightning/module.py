"""The LightningModule: training steps, validation and checkpoints for Lightning.

One batch of the loader is one optimizer step of one rank (``objective/step.py``), which splits it
into micro-batches itself, so that every depth's loss is the mean over the whole step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from data_modules.windows import WindowBatch
from mtp_lightning import processes
from mtp_lightning.metrics.rates import rates_of
from mtp_lightning.model import MTPModel
from mtp_lightning.nn import ops
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.optim.base import LearningRates, OptimizerConfig

log = logging.getLogger(__name__)


class MTPModule(pl.LightningModule):
    """Trains the model of an :class:`OptimizerStep`.

    Args:
        deferred: whether the weights are still to be drawn, after sharding.
        text_bytes: evaluated bytes of every document of the evaluation text, for bits per byte.
        extra: plain containers stored in every checkpoint (tokenizer, fingerprint of the data,
            composed config).
    """

    def __init__(
        self,
        step: OptimizerStep,
        *,
        optimizer: OptimizerConfig,
        deferred: bool,
        text_bytes: Sequence[int] | None,
        extra: dict[str, Any],
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.step, self.model = step, step.model
        self.schedule, self.balance = step.schedule, step.balance
        self.optimizer_config, self.deferred, self.extra = optimizer, deferred, extra
        self.val_metrics = rates_of(self.model, text_bytes)
        # Progress for schedules and the summary, restored from checkpoints.
        self.tokens, self.flops, self.seconds = 0, 0, 0.0
        # Values of the last step by log tag, and the last step that was logged.
        self._values: dict[str, Tensor | float] = {}
        self._row_step: int | None = None
        # The last validation: the optimizer steps before it, and its metrics by log tag.
        self.validated_step: int | None = None
        self.validation: dict[str, float] = {}

    def configure_model(self) -> None:
        """Shard the model if the strategy asks for it."""
        processes.tensors().lay_out(self)

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call ``work(*args)`` with the model's weights available. A sharded model gathers its
        weights for this call, so all computation with the model must go through it."""
        return work(*args)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.balance.parameters()
        for parameter in parameters:
            # Not in the module tree, where data parallelism would wait for their gradients.
            parameter.data = parameter.data.to(self.device)
        optimizer = self.optimizer_config.build(self.model, parameters)
        self._learning_rates = LearningRates(optimizer, self.optimizer_config.schedule)
        return optimizer

    def training_step(self, batch: WindowBatch, batch_idx: int) -> dict[str, Any]:
        """One optimizer step.

        Returns:
            ``loss`` (L) and ``losses`` [D + 1] (L_k, 0 where not computed), over all ranks;
            ``factors`` [D], those of L_1 .. L_D; ``computed`` [D + 1], whether each L_k was
            computed;
            ``tokens`` and ``flops`` of the step.
        """
        start = time.perf_counter()
        done = self.trainer.global_step  # optimizer steps before this one
        optimizer = self.optimizers(use_pl_optimizer=True)
        assert not isinstance(optimizer, list)
        learning_rates = self._learning_rates.set(done, self.trainer.max_steps)
        result = self.step(
            batch,
            self.progress(done),
            optimizer,  # type: ignore[arg-type]
            call_forward=self,
            backward=self.manual_backward,
            no_sync=getattr(self.trainer.strategy.model, "no_sync", nullcontext),
        )
        self.tokens += result.tokens
        self.flops += result.flops
        if self.device.type == "cuda" and self._logs(done + 1):
            torch.cuda.synchronize()  # the row's seconds are of work done, not of work queued
        self.seconds += time.perf_counter() - start
        # Rounded to the default dtype, as Lightning's log() rounds a number.
        logged_rates = {tag: torch.tensor(rate) for tag, rate in learning_rates.items()}
        self._values = {**result.values, **logged_rates}
        # For callbacks that monitor a value, such as Lightning's EarlyStopping. Lightning's log()
        # does this too, but takes a quarter of a millisecond per value.
        self.trainer.callback_metrics.update(
            {tag: torch.as_tensor(value) for tag, value in self._values.items()}
        )
        if self._logs(done + 1):
            self._log_axis(done + 1)
        return {
            "loss": result.loss,
            "losses": result.losses,
            "factors": result.plan.factors[1:],
            "computed": [k in result.plan.tasks for k in range(self.model.depth + 1)],
            "tokens": result.tokens,
            "flops": result.flops,
        }

    def progress(self, step: int) -> Progress:
        """The progress before optimizer step ``step`` (counted from 0)."""
        return Progress(step=step, max_steps=self.trainer.max_steps, tokens=self.tokens)

    def on_train_batch_end(self, outputs: Any, batch: WindowBatch, batch_idx: int) -> None:
        self._log_row()
        if self._stops_between_rows():
            self._log_axis(self.trainer.global_step)

    def validation_step(self, batch: WindowBatch, batch_idx: int) -> None:
        model = self.model
        self(lambda: self.val_metrics.update(model, batch, model(batch)))

    def on_validation_epoch_end(self) -> None:
        metrics = {f"val/{name}": value for name, value in self.val_metrics.compute().items()}
        self.val_metrics.reset()
        self.validated_step, self.validation = self.trainer.global_step, metrics
        # The cost of training so far: the x axes of a fair comparison.
        costs = ("tokens", "flops", "seconds")
        cost = {f"progress/{name}": float(getattr(self, name)) for name in costs}
        # Lightning takes the x axis from "step": optimizer steps done, as in training.
        step = float(self.trainer.global_step)
        self.log_dict({**metrics, **cost, "step": step}, rank_zero_only=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Log before the checkpoint is written: a run killed between the two would resume after this
        # step and never log it.
        self._log_row()
        checkpoint["model_config"] = self.model.config.to_dict()
        checkpoint["progress"] = dict(tokens=self.tokens, flops=self.flops, seconds=self.seconds)
        checkpoint["threads"] = torch.get_num_threads()
        checkpoint["cpu_kernels"] = ops.code()[0]
        checkpoint["balance"] = {"rule": self.balance.name, "state": self.balance.state_dict()}
        checkpoint["objective"] = self.step.objective.state_dict()
        checkpoint.update(self.extra)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.trainer.strategy.root_device.type == "cpu":
            self._warn_of_other_roundings(checkpoint)
        progress = checkpoint["progress"]
        self.tokens, self.flops = progress["tokens"], progress["flops"]
        self.seconds = progress["seconds"]
        self.balance.load_state_dict(checkpoint["balance"]["state"])
        self.step.objective.load_state_dict(checkpoint.get("objective", {}))

    @staticmethod
    def _warn_of_other_roundings(checkpoint: Mapping[str, Any]) -> None:
        """Warn if the run was computed with other threads or kernels so far."""
        text = (
            "This run was trained with %s and continues with %s: its numbers may differ in the "
            "last bits from those of an uninterrupted run. %s would give the same bits."
        )
        if (threads := checkpoint["threads"]) != (now := torch.get_num_threads()):
            log.warning(text, f"{threads} CPU threads", now, f"trainer.num_threads={threads}")
        kernels = checkpoint.get("cpu_kernels", "pytorch")
        if kernels != ops.code()[0]:
            built = "The C++ that pip install builds, on a CPU with the same instructions,"
            remedy = built if kernels.startswith("native") else "MTP_LIGHTNING_NATIVE=0"
            log.warning(text, f"the {kernels} layers", f"the {ops.code()[0]} ones", remedy)

    def whole_model(self, *, everywhere: bool = False) -> MTPModel | None:
        """The model for work of a single process, such as decoding: the model itself, or a copy of
        a sharded one; None on all processes but the first, unless ``everywhere``. All processes
        must call this together."""
        return processes.tensors().whole_model(self, everywhere=everywhere)

    def log_here(
        self, values: Mapping[str, Tensor | float], step: int, *, always: bool = False
    ) -> None:
        """Log values by tag in the row of ``step`` (optimizer steps done). ``always`` logs at steps
        that ``trainer.log_every_n_steps`` skips, too.

        Lightning's log() would repeat values that only some steps have in later rows.
        """
        if values and (always or self._logs(step)):
            plain = {tag: float(value) for tag, value in values.items()}
            for logger in self.trainer.loggers:
                logger.log_metrics(plain, step)

    def _log_row(self) -> None:
        """Log the last step, unless it is logged already."""
        step = self.trainer.global_step
        if self._row_step == step:
            return
        self._row_step = step
        self.log_here(self._values, step)
        if self._stops_between_rows():
            learning_rates = {t: v for t, v in self._values.items() if t.startswith("train/lr")}
            self.log_here(learning_rates, step, always=True)

    def _stops_between_rows(self) -> bool:
        """Whether a callback stops at a step that is not due; Lightning logs that step too."""
        return self.trainer.should_stop and not self._logs(self.trainer.global_step)

    def _logs(self, step: int) -> bool:
        """Whether ``trainer.log_every_n_steps`` chooses a step."""
        return bool(step % self.trainer.log_every_n_steps == 0)  # type: ignore[attr-defined]

    def _log_axis(self, step: int) -> None:
        """Log "step", which Lightning uses as the x axis of values that callbacks log.

        Called only at steps that are logged, as Lightning's log() takes a quarter of a millisecond.
        """
        self.log("step", float(step))
