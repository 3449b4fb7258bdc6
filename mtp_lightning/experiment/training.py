"""A run: built anew, from another run or from what its folder holds; trained; summarised."""

from __future__ import annotations

import logging
import signal
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from data_modules.store_module import StoreDataModule
from mtp_lightning import compare
from mtp_lightning.callbacks.base import run_callbacks
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.cli import Stopped
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.branching import branch_point, check_branch
from mtp_lightning.experiment.build import (
    adopt_trunk,
    beginning_windows,
    build_data,
    build_model_config,
    build_module,
    build_trainer,
    match_reference,
    recall_data,
    settle_data,
)
from mtp_lightning.experiment.command_line import hyperparameters
from mtp_lightning.experiment.device import kernels_told, settle_device, use_tensor_cores
from mtp_lightning.experiment.generating import print_sample
from mtp_lightning.experiment.instantiate import trusted_packages
from mtp_lightning.experiment.lost_peers import telling_of_lost_peers
from mtp_lightning.experiment.peers import Peers, check_world, find_peers
from mtp_lightning.experiment.run_loggers import end_loggers
from mtp_lightning.experiment.strategy import ShardedStrategy
from mtp_lightning.experiment.trunk_states import keep_states
from mtp_lightning.init_from import start_from
from mtp_lightning.model import ModelConfig
from mtp_lightning.module import MTPModule
from mtp_lightning.opening import StoredModel, read_model
from mtp_lightning.run import checkpoints, parts
from mtp_lightning.run.atomic import write_json
from mtp_lightning.run.config import WITHOUT_BEARING, describe_differences, flatten, read_yaml
from mtp_lightning.run.folder import claimed
from mtp_lightning.run.layout import CHECKPOINTS, CONFIG_FILE, METRICS_FILE, SUMMARY_FILE
from mtp_lightning.run.loading import brought_trunk, describe_interrupt, model_weights
from mtp_lightning.run.metrics import read_metrics
from mtp_lightning.run.solved import time_to_solve
from mtp_lightning.run.summary import environment, print_paths, print_summary
from mtp_lightning.runtime import keep_freed_memory, quiet_lightning, set_threads
from mtp_lightning.settings import is_whole
from mtp_lightning.stored import require_memory

if TYPE_CHECKING:
    from data_modules import WindowDataModule

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready for its trainer.

    Attributes:
        asked: the config, with the trunk that ``init_from`` brought.
        cfg: that, with the layers or steps that ``compare.match`` asked for.
        matched: what was matched; None without a match.
        data: its token store built or found.
        module: with the weights that it starts from, unless it continues.
        resume_from: the checkpoint that the run continues or branches from; None for a new run.
        resume_step: the optimizer step stored there.
    """

    asked: DictConfig
    cfg: DictConfig
    matched: compare.Matched | None
    data: WindowDataModule
    module: MTPModule
    resume_from: Path | None
    resume_step: int | None


def prepare(cfg: DictConfig, folder: Path, peers: Peers | None = None) -> Prepared:
    """Build a run, from scratch, from another run, or from what its folder holds.

    What is read of a checkpoint here is gone when this returns: training needs the memory.

    Args:
        cfg: the config.
        folder: of the run.
        peers: the processes that prepare it together; None for this one alone.
    """
    cfg = settle_device(cfg)
    peers = Peers() if peers is None else peers
    newest = peers.told("resume", lambda: _named(checkpoints.newest_intact(folder / CHECKPOINTS)))
    resume_from = None if newest is None else folder / CHECKPOINTS / newest
    if newest is None and _kept_none(folder):
        raise UserError(
            f"{folder} holds a finished run that kept no checkpoint to go on from: take another "
            "run_dir."
        )
    branches = newest is None and cfg.branch_from is not None
    if branches:
        point = peers.told("branch", lambda: str(branch_point(cfg.branch_from)))
        assert point is not None
        resume_from = Path(point)
    # Looked through a moment ago, and the weights are read when they are wanted.
    stored = None if resume_from is None else checkpoints.load(resume_from, mapped=True)
    if stored is not None:
        cfg = recall_data(cfg, stored.get("config", {}))
    start: StoredModel | None = None
    tokenizer_state, brings_trunk = None, False
    if cfg.init_from is not None:
        if stored is None:
            start = read_model(cfg.init_from, allow=trusted_packages(cfg))
            tokenizer_state, brings_trunk = start.tokenizer_state, start.brings_trunk
            if brings_trunk:
                cfg = adopt_trunk(cfg, start.config.trunk, source=start.path)
                if tokenizer_state is None:
                    log.warning(
                        "%s holds no tokenizer.json: this run's own tokenizer settings are used, "
                        "which must be those that the model was trained with.",
                        start.path,
                    )
        else:
            # The run has begun: it goes on with what it has, whatever became of its start.
            tokenizer_state = stored.get("tokenizer")
            brings_trunk = brought_trunk(stored)
            if brings_trunk:
                allow = trusted_packages(cfg)
                trunk = ModelConfig.from_dict(stored["model_config"], allow=allow).trunk
                cfg = adopt_trunk(cfg, trunk, source=Path(cfg.init_from))
    if not brings_trunk:  # before hours of data
        rows = cfg.tokenizer.get("vocab_size")
        _require_affordable(cfg, rows if is_whole(rows) and "task" not in cfg.data else 1)
    with peers.in_turn():
        data = build_data(cfg, tokenizer_state, brought=brings_trunk)
    cfg = asked = settle_data(cfg, data)
    cfg, matched = match_reference(cfg, data.tokenizer.vocab_size)
    _require_affordable(cfg, data.tokenizer.vocab_size)
    module = build_module(cfg, data, asked=asked)
    resume_step = None
    if stored is not None:
        resume_step = check_resumable(stored, module, source=resume_from)
        if branches:
            check_branch(stored, asked, allow=trusted_packages(cfg))
            log.info("Branching from %s at step %d.", resume_from, resume_step)
        else:
            _say_changes(stored, module)
            log.info("Continuing %s from step %d.", folder, resume_step)
    elif start is not None:
        begins = module.model.config.mtp.init != "random"
        windows = beginning_windows(data) if begins else None
        log.info("Starting from %s: %s.", start.path, start_from(module.model, start, windows))
    if isinstance(data, StoreDataModule) and data.cache_states:
        if stored is not None:  # the trunk's weights, which Lightning would bring too late
            assert resume_from is not None
            module.model.load_state_dict(model_weights(parts.filled(stored, resume_from)))
        with peers.in_turn():
            data.states = keep_states(module.model, data, cfg.trainer)
    return Prepared(
        asked=asked,
        cfg=cfg,
        matched=matched,
        data=data,
        module=module,
        resume_from=resume_from,
        resume_step=resume_step,
    )


def _require_affordable(cfg: DictConfig, vocab_size: int) -> None:
    """Refuse a model whose weights alone are more than the run's machines can hold."""
    machines = cfg.trainer.num_nodes if cfg.trainer.strategy == "fsdp" else 1
    require_memory(build_model_config(cfg, vocab_size), bytes_each=2, parts=machines)


def _kept_none(folder: Path) -> bool:
    """Whether a folder is of a finished run whose own config had its checkpoints removed."""
    if not ((folder / SUMMARY_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return False
    own = read_yaml(folder / CONFIG_FILE)
    return isinstance(own, dict) and flatten(own).get("callbacks.checkpoints.keep") == "none"


def _named(path: Path | None) -> str | None:
    return None if path is None else path.name


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run an experiment, or continue it where its folder holds a checkpoint.

    Returns:
        The summary: every final metric, and what the run cost; also in ``summary.json``.

    Raises:
        UserError: settings that do not fit together, a loss that is not finite, or another process
            of the run that has gone.
        OSError: missing input, or a disk that is full.
        Stopped: on Ctrl-C or SIGTERM; the message says what was saved.
        BlockingIOError: another process trains in the same folder.
    """
    quiet_lightning()
    keep_freed_memory()
    folder = Path(cfg.paths.output_dir)
    with telling_of_lost_peers(folder), ExitStack() as claim:
        peers = find_peers()
        if peers.leads:
            claim.enter_context(claimed(folder))
        devices = cfg.trainer.devices
        set_threads(
            cfg.trainer.num_threads,
            processes=devices if isinstance(devices, int) and devices > 0 else 1,
        )
        check_world(cfg.trainer, peers)
        peers.require_shared(folder)
        return _train(cfg, folder, peers)


def _train(cfg: DictConfig, folder: Path, peers: Peers) -> dict[str, Any]:
    run = prepare(cfg, folder, peers)
    use_tensor_cores(run.cfg)
    data, module = run.data, run.module
    trainer = build_trainer(
        run.cfg,
        resume_step=run.resume_step,
        may_skip=module.schedule.depth_ever_skipped
        or module.balance.skips
        or (data.masks_targets and module.model.depth > 0),  # a depth may be left without a target
    )
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(run.asked, folder / CONFIG_FILE, resolve=True)
        data.tokenizer.save(folder)
        if told := kernels_told(run.cfg.trainer.accelerator):
            log.info(told)
    params = hyperparameters(cfg)
    for logger in trainer.loggers:
        logger.log_hyperparams(params)
    try:
        with peers.handing_on(folder):
            trainer.fit(module, datamodule=data, ckpt_path=run.resume_from)
        if module.validated_step != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
    except SystemExit as stop:  # how Lightning ends after Ctrl-C and SIGTERM
        signum = signal.SIGTERM if trainer.received_sigterm else signal.SIGINT
        raise Stopped(describe_interrupt(folder), signum) from stop

    summary = summarise(trainer, module, data)
    if cfg.init_from is not None:
        summary["init_from"] = str(cfg.init_from)
    if cfg.branch_from is not None:
        summary["branch_from"] = str(cfg.branch_from)
    if run.matched is not None:
        early = summary.get("stopped_early", False)
        matched = run.matched.used(module.flops) if early else run.matched
        summary["compare"] = matched.to_dict()
    if trainer.is_global_zero:
        summary |= solving(data, folder)
        write_json(summary, folder / SUMMARY_FILE)
    end_loggers(trainer, params, summary)
    too_large = isinstance(trainer.strategy, ShardedStrategy) and trainer.strategy.in_parts
    model = None if too_large else module.whole_model()  # which all processes gather
    if trainer.is_global_zero:
        print_summary(summary, depth=module.model.depth)
        if model is not None:
            print_sample(model, data, seed=cfg.seed)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoints):
                checkpoints.keep(callback.folder, callback.keep)
        print_paths(folder)
    return summary


def solving(data: WindowDataModule, folder: Path) -> dict[str, Any]:
    """``time_to_solve`` of a task's run, None if it was never solved; nothing of others.

    From ``metrics.csv``, as the report has it: that goes on when a run is resumed, and holds the
    validation behind the last step, too, which no checkpoint does.
    """
    if not data.answer_sets():
        return {}
    with suppress(OSError):  # a disk that was full: nobody knows
        return {"time_to_solve": time_to_solve(read_metrics(folder / METRICS_FILE))}
    return {}


def check_resumable(checkpoint: dict[str, Any], module: MTPModule, *, source: Path | None) -> int:
    """The step of a checkpoint, after making sure that it holds this very architecture.

    Raises:
        UserError: it holds another one; the differing keys are named.
    """
    config = module.model.config
    free = ["mtp.init", *(f"trunk.{key}" for key in config.trunk.training_keys)]
    stored = checkpoint["model_config"]
    begun = stored["mtp"].get("init", "random")
    if begun != config.mtp.init:
        raise UserError(
            f"{source} is of a run whose modules began with mtp.init={begun}, and one that goes on "
            f"has nothing to begin with mtp.init={config.mtp.init}: set mtp.init={begun}, or start "
            "in another run_dir."
        )
    differences = describe_differences(stored, config.to_dict(), ignore=free)
    if differences:
        raise UserError(
            f"{source} holds another architecture than this config ({'; '.join(differences)}): "
            "start in another run_dir, or go back to the settings that the run began with."
        )
    if checkpoint.get("optimizer_states") == []:
        raise UserError(
            f"{source} holds the weights alone (callbacks.checkpoints.keep=weights), from which no "
            "run goes on: start another one by init_from."
        )
    rule = checkpoint["balance"]["rule"]
    if rule != module.balance.name:
        raise UserError(
            f"{source} was trained with balance={rule}, whose state balance={module.balance.name} "
            f"cannot go on from: set balance={rule}, or start in another run_dir."
        )
    return int(checkpoint["global_step"])


def _say_changes(checkpoint: dict[str, Any], module: MTPModule) -> None:
    changed = describe_differences(
        checkpoint["config"], module.extra["config"], ignore=WITHOUT_BEARING
    )
    if changed:
        log.warning("Continuing with changed settings: %s.", "; ".join(changed))


def summarise(trainer: pl.Trainer, module: MTPModule, data: WindowDataModule) -> dict[str, Any]:
    """Everything a reader needs to compare this run with another."""
    config = module.model.config
    early = {"stopped_early": True} if trainer.global_step < trainer.max_steps else {}
    return {
        **module.validation,
        **{n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("decode/")},
        **{name: value for c in run_callbacks(trainer) for name, value in c.summary().items()},
        "step": trainer.global_step,
        **early,
        "tokens": module.tokens,
        "flops": module.flops,
        "seconds": module.seconds,
        "parameters": config.num_params(),
        "parameters_active": config.num_active_params(),
        "parameters_trunk": config.trunk.num_params(),
        "parameters_trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "flops_per_token": module.step.flops_per_token(data.seq_len),
        **({"mtp_reads_tokens": module.model.mtp.reads_tokens} if config.mtp.depth else {}),
        **({} if config.mtp.predicts_tokens else {"mtp_predicts_tokens": False}),
        "world_size": trainer.world_size,
        "seed": module.extra["config"]["seed"],
        "evaluation": data.evaluation_summary(),
        "data": data.summary(),
        **environment(),
    }
