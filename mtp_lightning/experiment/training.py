"""A training run, from its config to its summary: prepared, fitted, finished.

A function never modifies the config that it receives.
"""

from __future__ import annotations

import logging
import os
import signal
from collections import ChainMap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf

from mtp_lightning import processes
from mtp_lightning.callbacks.base import WritesBeside, run_callbacks
from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.shell import VERBOSE, Stopped
from mtp_lightning.errors import UserError, reason_of
from mtp_lightning.experiment.build import (
    apply_match,
    build_data,
    build_model_config,
    build_module,
)
from mtp_lightning.experiment.compose import hyperparameters
from mtp_lightning.experiment.device import kernels_line, resolve_auto, use_tensor_cores
from mtp_lightning.experiment.starting import (
    Origin,
    check_continues,
    find_origin,
    restore_data_digest,
)
from mtp_lightning.experiment.trainer import build_trainer
from mtp_lightning.loggers.guard import GuardedLogger
from mtp_lightning.module import MTPModule
from mtp_lightning.processes import Peers
from mtp_lightning.run import checkpoints
from mtp_lightning.run.atomic import replacing, write_json
from mtp_lightning.run.folder import claimed
from mtp_lightning.run.layout import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from mtp_lightning.run.metrics import read_metrics
from mtp_lightning.run.summary import environment, print_answer, print_paths, print_summary
from mtp_lightning.runtime import keep_freed_memory, quiet_lightning, set_threads
from mtp_lightning.settings import is_whole
from mtp_lightning.stored import read_json, require_memory

if TYPE_CHECKING:
    from data_modules import WindowDataModule
    from mtp_lightning.matching import Matched
    from mtp_lightning.model import MTPModel

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train a run, or continue it if its folder holds a checkpoint.

    Returns:
        The summary, which ``summary.json`` also holds: all final metrics and the run's cost.

    Raises:
        UserError: settings do not fit together, a loss is not finite, or another process of the run
            has ended early.
        OSError: an input is missing, or the disk is full.
        Stopped: on Ctrl-C or SIGTERM; the message says what was saved.
        BlockingIOError: another process trains in the same folder.
    """
    quiet_lightning()
    keep_freed_memory()
    check_config.check(OmegaConf.to_container(cfg), "config")  # type: ignore[arg-type]
    folder, devices = Path(cfg.paths.output_dir), cfg.trainer.devices
    peers = processes.find(cfg.trainer)
    with peers.watched(folder), claimed(folder) if peers.leads else _follower():
        n_local = devices if isinstance(devices, int) and devices > 0 else 1
        set_threads(cfg.trainer.num_threads, processes=n_local)
        peers.require_shared(folder)
        run = prepare(cfg, folder, peers)
        params = hyperparameters(cfg)
        return finish(run, fit(run, params), params)


@contextmanager
def _follower() -> Iterator[None]:
    """A block of a process that leaves messages to the leading one, also about Ctrl-C."""
    logging.getLogger("mtp_lightning").setLevel(logging.ERROR)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(128 + getattr(interrupt, "signum", signal.SIGINT)) from interrupt


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """A run that is ready for its trainer."""

    config: DictConfig  # with every ``auto`` replaced and ``compare.match`` applied
    # The config before matching, which checkpoints and config.yaml hold. Matching it again gives
    # the same layers and steps.
    stored: DictConfig
    folder: Path
    peers: Peers  # the processes that prepare the run together
    data: WindowDataModule  # prepared
    module: MTPModule  # with initial weights; Lightning loads those of a run that continues
    checkpoint: Path | None  # the file that the run continues or branches from
    resume_step: int | None  # the optimizer step of the checkpoint
    branches: bool  # whether the checkpoint is another run's
    matched: Matched | None  # the result of ``compare.match``


def prepare(cfg: DictConfig, folder: Path, peers: Peers) -> PreparedRun:
    """Build everything that a run's trainer needs."""
    config = resolve_auto(cfg)
    use_tensor_cores(config)  # also for the trunk's states, which equal those of a step
    origin = find_origin(config, folder, peers)
    config = restore_data_digest(config, origin)
    if origin.trunk is not None:
        from mtp_lightning.experiment.init_from import adopt_trunk

        config = adopt_trunk(config, origin.trunk, origin.start)
    else:  # before the data, which may take hours
        rows = config.tokenizer.get("vocab_size")
        _require_affordable(config, rows if is_whole(rows) and "task" not in config.data else 1)
    if origin.start is not None and config.compare.match == "none":  # likewise
        from mtp_lightning.experiment.init_from import check_start

        model_config = build_model_config(config, origin.start.config.trunk.vocab_size)
        check_start(model_config.on_meta(), origin.start)
    with peers.in_turn():
        data = build_data(config, origin.tokenizer_state, imported=origin.trunk is not None)
    stored = config.copy()
    stored.data.update(data.resolved_settings())
    config, matched = apply_match(stored, data.tokenizer.vocab_size)
    _require_affordable(config, data.tokenizer.vocab_size)
    module = build_module(config, data, stored=stored)
    step = None
    if origin.content is not None:
        step = check_continues(module, origin, stored, folder, steps=config.trainer.max_steps)
    elif origin.start is not None:
        from mtp_lightning.experiment.init_from import load_start

        load_start(module.model, origin.start, data)
    if config.data.get("cache_states", False):
        _keep_states(module.model, data, origin, config, peers)
    # ``origin``, the loaded checkpoint, ends here, which frees its memory before training.
    return PreparedRun(
        config=config,
        stored=stored,
        folder=folder,
        peers=peers,
        data=data,
        module=module,
        checkpoint=origin.checkpoint,
        resume_step=step,
        branches=origin.branches,
        matched=matched,
    )


def _keep_states(
    model: MTPModel, data: WindowDataModule, origin: Origin, config: DictConfig, peers: Peers
) -> None:
    """Give the data the frozen trunk's states for their windows."""
    from data_modules.store_module import StoreDataModule
    from mtp_lightning.experiment.trunk_states import keep_states
    from mtp_lightning.run.loading import model_weights

    assert isinstance(data, StoreDataModule), "tasks keep no states"
    if origin.content is not None:  # Lightning loads the trunk's weights only later
        assert origin.checkpoint is not None
        filled = checkpoints.filled(origin.content, origin.checkpoint)
        model.load_state_dict(model_weights(filled))
    with peers.in_turn():
        data.states = keep_states(model, data, config.trainer)


def _require_affordable(config: DictConfig, vocab_size: int) -> None:
    """Refuse a model whose weights alone exceed the memory of the run's machines."""
    machines = config.trainer.num_nodes if config.trainer.strategy == "fsdp" else 1
    require_memory(build_model_config(config, vocab_size), machines=machines)


def _store_config(run: PreparedRun) -> None:
    """Write ``config.yaml``. A run that has done more steps than ``trainer.max_steps`` now asks for
    stores the number done."""
    stored, steps_done = run.stored, run.resume_step or 0
    if stored.compare.match == "none" and steps_done > stored.trainer.max_steps:
        stored = stored.copy()
        stored.trainer.max_steps = steps_done
    with replacing(run.folder / CONFIG_FILE) as temporary:
        OmegaConf.save(stored, temporary, resolve=True)


def fit(run: PreparedRun, params: dict[str, Any]) -> pl.Trainer:
    """Train the run, validate its last step, and return the trainer."""
    data, module = run.data, run.module
    trainer = build_trainer(
        run.config,
        resume_step=run.resume_step,
        may_skip=module.schedule.depth_ever_skipped
        or module.balance.skips
        or (data.masks_targets and module.model.depth > 0),  # a depth may have no target in a batch
    )
    if trainer.is_global_zero:
        run.folder.mkdir(parents=True, exist_ok=True)
        data.tokenizer.save(run.folder)
        # Not before Lightning and the callbacks have accepted the settings and the checkpoint.
        trainer.callbacks.append(LambdaCallback(on_train_start=lambda *_: _store_config(run)))  # type: ignore[attr-defined]
        if kernels := kernels_line(run.config.trainer.accelerator):
            log.info(kernels)
    if run.branches:  # after the callbacks, which have loaded the other run's state
        ended = LambdaCallback(on_fit_start=lambda *_: _require_unended(run, trainer))
        trainer.callbacks.append(ended)  # type: ignore[attr-defined]
    for logger in trainer.loggers:
        logger.log_hyperparams(params)
    try:
        with run.peers.handing_on(run.folder):
            trainer.fit(module, datamodule=data, ckpt_path=run.checkpoint)
        if trainer.is_global_zero:
            _store_config(run)  # a run without steps to train did not begin to
        if module.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
    except MisconfigurationException as error:
        raise UserError(
            f"Lightning refuses a setting or callback: {reason_of(error)}: leave it out."
        ) from error
    except SystemExit as stop:  # how Lightning ends after Ctrl-C and SIGTERM
        from mtp_lightning.run.loading import describe_interrupt

        signum = signal.SIGTERM if trainer.received_sigterm else signal.SIGINT
        raise Stopped(describe_interrupt(run.folder), signum) from stop
    return trainer


def _require_unended(run: PreparedRun, trainer: pl.Trainer) -> None:
    """Refuse a branch that callbacks, whose state it takes over, end before its first step."""
    if trainer.should_stop:
        raise UserError(
            f"branch_from={run.config.branch_from} cannot be continued: a callback that stops runs "
            "(early_stopping, stop_when_solved) takes that run's state over and would end this one "
            "before its first step: give more patience or another threshold, or leave it out."
        )


def finish(run: PreparedRun, trainer: pl.Trainer, params: dict[str, Any]) -> dict[str, Any]:
    """Store and print the summary and samples of the model's text, then remove surplus checkpoints;
    return the summary."""
    module, data, folder, config = run.module, run.data, run.folder, run.config
    summary = summarize(trainer, module, data)
    for key in ("init_from", "branch_from"):
        if config[key] is not None:
            summary[key] = str(config[key])
    if run.matched is not None:
        reached = run.matched.used(module.flops) if "stopped_early" in summary else run.matched
        summary["compare"] = reached.to_dict()
    if trainer.is_global_zero:
        summary |= solving(data, folder)
        # A finished run that is started again trains nothing, and keeps the speeds that it had.
        with suppress(OSError, UserError):
            former = read_json(folder / SUMMARY_FILE)
            if isinstance(former, dict) and former.get("step") == summary["step"]:
                summary = {k: v for k, v in former.items() if k.startswith("perf/")} | summary
        write_json(summary, folder / SUMMARY_FILE)
    final = {tag: value for tag, value in summary.items() if "/" in tag}
    for logger in trainer.loggers:
        assert isinstance(logger, GuardedLogger)
        logger.log_final(params, final, trainer.global_step)
        logger.close()
    too_large = isinstance(trainer.strategy, WritesBeside) and trainer.strategy.in_parts
    model = None if too_large else module.whole_model()  # all processes gather it
    if trainer.is_global_zero:
        if os.environ.get(VERBOSE) == "1":
            print_summary(summary, depth=module.model.depth)
        else:
            print_answer(summary)
        if model is not None:
            from mtp_lightning.experiment.samples import print_samples

            print_samples(model, data, seed=config.seed)
        for callback in run_callbacks(trainer):
            callback.on_run_end()
        allow = module.model.config.packages()
        print_paths(folder, writes=data.tokenizer.kind != "symbols", allow=allow)
    return summary


def solving(data: WindowDataModule, folder: Path) -> dict[str, Any]:
    """``time_to_solve`` of a task's run, None if the task was never solved; empty for text.

    It is computed from ``metrics.csv``, as in the report: that file spans all resumptions of a run
    and includes the validation after the last step, which no checkpoint does.
    """
    if not data.answer_sets:
        return {}
    from mtp_lightning.run.solved import time_to_solve

    with suppress(OSError):  # metrics.csv may be missing after a full disk
        return {"time_to_solve": time_to_solve(read_metrics(folder / METRICS_FILE))}
    return {}


def summarize(trainer: pl.Trainer, module: MTPModule, data: WindowDataModule) -> dict[str, Any]:
    """The final metrics, the run's cost and its surroundings, for comparing runs."""
    config = module.model.config
    return {
        **module.validation,
        # Of several reasons why nothing was decoded, the first callback's.
        **ChainMap(*(callback.summary() for callback in run_callbacks(trainer))),
        "step": trainer.global_step,
        **({"stopped_early": True} if trainer.global_step < trainer.max_steps else {}),
        "tokens": module.tokens,
        "flops": module.flops,
        "seconds": module.seconds,
        "parameters": config.num_params(),
        "parameters_active": config.num_active_params(),
        "parameters_trunk": config.num_trunk_params(),
        "parameters_trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "flops_per_token": module.step.cost.per_token(data.seq_len),
        **({"mtp_reads_tokens": module.model.mtp.reads_tokens} if config.mtp.depth else {}),
        **({} if config.mtp.predicts_tokens else {"mtp_predicts_tokens": False}),
        "world_size": trainer.world_size,
        "seed": module.extra["config"]["seed"],
        **({"changed": changed} if (changed := module.extra.get("changed")) else {}),
        "evaluation": data.evaluation_summary(),
        "data": data.summary(),
        **environment(trainer.strategy.root_device),
    }
