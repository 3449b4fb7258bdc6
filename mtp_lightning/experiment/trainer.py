"""Builds Lightning's Trainer of a run, with its loggers and callbacks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from mtp_lightning import processes
from mtp_lightning.callbacks.base import monitored, run_callbacks
from mtp_lightning.callbacks.checkpoints import AtomicCheckpointIO
from mtp_lightning.callbacks.termination import stop_together
from mtp_lightning.errors import UserError, reason_of
from mtp_lightning.experiment.device import MIXED
from mtp_lightning.experiment.instantiate import instantiate, require_annotated, trusted_packages
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.loggers.guard import GuardedLogger, warn_of_failure
from mtp_lightning.run.layout import METRICS_FILE

# Keys of the trainer group that this project applies itself; Lightning's Trainer does not get them.
_OWN_TRAINER_KEYS = (
    *("accumulate_grad_batches", "gradient_clip_val", "num_threads", "compile"),
    *("shard_size", "split_checkpoint_gb"),
)

# The states of an EarlyStopping that no threshold has ended.
_NO_THRESHOLD = (EarlyStoppingReason.NOT_STOPPED, EarlyStoppingReason.PATIENCE_EXHAUSTED)


def build_loggers(cfg: DictConfig, *, resume_step: int | None) -> list[Any]:
    """Build the loggers of the group ``logger``; one is always that of ``metrics.csv``, which
    sweeps, search and reports read. Logs after the step ``resume_step`` are dropped (None: a new
    run). A wrong setting or a missing package raises a :class:`UserError`."""
    built: dict[str, Any] = {}
    for key, node in (cfg.get("logger") or {}).items():
        try:
            if node is not None:
                built[str(key)] = instantiate(node, kind=Logger)
        except ValueError:
            raise
        except Exception as error:  # such as a server that does not answer, which must not stop it
            warn_of_failure(str(key), "construction", error)
    folder = Path(cfg.paths.output_dir)
    if not any(isinstance(logger, MetricsCSV) for logger in built.values()):
        built = {"csv": MetricsCSV(folder), **built}
    loggers = [GuardedLogger(logger, key) for key, logger in built.items()]
    if resume_step is None and (folder / METRICS_FILE).exists():
        resume_step = 0  # the run was killed before its first checkpoint, and starts again
    if resume_step is not None:
        for logger in loggers:
            logger.resume_from(resume_step)
    return loggers


class EndedEarly(pl.Callback):
    """Corrects two behaviors of Lightning's EarlyStopping.

    Every process gets the monitored value, which only the first one logs. A run that EarlyStopping
    has ended trains no step when it is started again, unless ``patience`` is larger or a threshold
    is another one now; EarlyStopping would train it until the next validation, with the patience of
    the checkpoint.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remembers the settings, before the checkpoint replaces them."""
        rules = trainer.early_stopping_callbacks
        self._patience = [rule.patience for rule in rules]
        self._limits = [
            [rule.stopping_threshold, rule.divergence_threshold, rule.check_finite]
            for rule in rules
        ]
        self._ended_by = self._limits

    def state_dict(self) -> dict[str, Any]:
        """The thresholds, which EarlyStopping does not store."""
        return {"limits": self._limits} if self._limits else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._ended_by = state_dict["limits"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops a run that has no patience left, or that a threshold has ended."""
        for rule, patience in zip(trainer.early_stopping_callbacks, self._patience, strict=True):
            rule.patience = patience
            if self._limits != self._ended_by:
                rule.stopping_reason = EarlyStoppingReason.NOT_STOPPED
            by_value = rule.stopping_reason not in _NO_THRESHOLD
            trainer.should_stop |= rule.wait_count >= patience or by_value

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses a value that the validation did not log."""
        for rule in trainer.early_stopping_callbacks if trainer.state.fn == "fit" else ():
            if rule.strict:
                value = torch.tensor(monitored(trainer, "callbacks.early_stopping", rule.monitor))
                trainer.callback_metrics.setdefault(rule.monitor, value)


def _checks_of_users_code(cfg: DictConfig) -> list[pl.Callback]:
    """The callbacks that look for mistakes in classes from outside of this project."""
    if not trusted_packages(cfg):
        return []
    from mtp_lightning.callbacks.first_step import FirstStep
    from mtp_lightning.callbacks.future import HiddenFuture

    return [HiddenFuture(), FirstStep()]


def _slurm_environment() -> list[ClusterEnvironment]:
    """How the processes of a run inside a Slurm job are counted, as ``distributed/rendezvous.py``
    counts them; none elsewhere. Lightning would take the SLURM_NTASKS of a batch script for the
    number of this run's processes, also without srun."""
    if "SLURM_NTASKS" not in os.environ or TorchElasticEnvironment.detect():
        return []
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return [LightningEnvironment()]
    try:
        return [SLURMEnvironment(auto_requeue=False)]
    except RuntimeError as error:
        raise UserError(f"Lightning cannot use this srun step: {error}") from error


def build_trainer(cfg: DictConfig, *, resume_step: int | None, may_skip: bool) -> pl.Trainer:
    """Build Lightning's Trainer with callbacks and loggers from a config without ``auto``.

    Args:
        resume_step: the optimizer step that the run continues from; logs after it are dropped.
        may_skip: whether some parameters get no gradient in some steps.

    Raises:
        UserError: the trainer group has a key or a value that is refused.
    """
    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore
    for key in _OWN_TRAINER_KEYS:
        settings.pop(key)
    require_annotated(pl.Trainer, settings, "trainer")
    settings["strategy"] = processes.strategy(cfg.trainer, may_skip=may_skip)
    plugins: list[Any] = [AtomicCheckpointIO(), *_slurm_environment()]
    if settings["precision"] in MIXED:
        settings["precision"] = MIXED[0]
    if settings["precision"] == "64-true":  # by the word, Lightning refuses it for sharded models
        plugins.append(DoublePrecision())
        settings["precision"] = None
    nodes = filter(None, (cfg.get("callbacks") or {}).values())
    callbacks = [EndedEarly(), *_checks_of_users_code(cfg)]
    callbacks += [instantiate(node, kind=pl.Callback) for node in nodes]
    if not any(isinstance(callback, pl.callbacks.Checkpoint) for callback in callbacks):
        settings.setdefault("enable_checkpointing", False)  # else Lightning adds its own
    loggers = build_loggers(cfg, resume_step=resume_step)
    try:
        trainer = pl.Trainer(
            **settings,
            default_root_dir=cfg.paths.output_dir,
            max_epochs=-1,
            # val_check_interval then counts optimizer steps across epochs.
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            # The loaders split the data among processes themselves, in an order that can resume.
            use_distributed_sampler=False,
            enable_model_summary=False,
            logger=loggers,
            callbacks=callbacks,
            plugins=plugins,
        )
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise UserError(
            f"The trainer group has a key that Lightning refuses: {reason_of(error)}: leave it out."
        ) from error
    stop_together(trainer)
    for callback in run_callbacks(trainer):
        if callback.takes_gradients:
            processes.require_whole_gradients(cfg.trainer, callback.takes_gradients)
    # 1.0 is the share of all batches, but the whole number 1 is a single batch.
    if isinstance(trainer.limit_val_batches, int) or trainer.limit_val_batches != 1.0:
        raise UserError(
            f"trainer.limit_val_batches={trainer.limit_val_batches} would evaluate a part of the "
            "evaluation text: leave it (and what sets it, fast_dev_run and overfit_batches) out, "
            "and set data.eval_bytes."
        )
    return trainer
