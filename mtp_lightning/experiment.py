"""The one place that turns a config into objects, and runs them.

The way through a run: config -> data -> model -> module -> trainer -> summary.
"""

from __future__ import annotations

import logging
import re
import signal
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from data_modules.tokenizers import tokenizer_from_state
from mtp_lightning import checkpoint_io, compare
from mtp_lightning.callbacks.checkpoint_plugin import AtomicCheckpointIO
from mtp_lightning.callbacks.precision_plugin import TokenDoublePrecision
from mtp_lightning.callbacks.throughput import Throughput
from mtp_lightning.cli import Stopped
from mtp_lightning.decoding.measure import decoding_report
from mtp_lightning.evaluation import evaluate_model
from mtp_lightning.generation import print_sample
from mtp_lightning.init_from import FREE, Start, brought_trunk, read_start, start_from
from mtp_lightning.metrics.rates import bits_per_byte
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.module import MTPModule
from mtp_lightning.nn.block import Block
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.runs import (
    CHECKPOINTS,
    LoadedRun,
    describe_differences,
    describe_interrupt,
    load_run,
    print_paths,
)
from mtp_lightning.runtime import (
    keep_freed_memory,
    pick_accelerator,
    quiet_lightning,
    set_threads,
)
from mtp_lightning.summary import environment, print_summary, write_summary

if TYPE_CHECKING:
    from data_modules import TokenDataModule

log = logging.getLogger(__name__)

CONF = Path(__file__).parents[1] / "conf"
_TARGET = re.compile(r"^\s*_target_:\s*([\w.]+)\s*$", re.MULTILINE)

# Keys of the trainer group that are this project's, not lightning.pytorch.Trainer's.
_OWN_TRAINER_KEYS = ("accumulate_grad_batches", "gradient_clip_val", "num_threads", "compile")
_PRECISIONS = ("32-true", "bf16-mixed", "64-true")
_STRATEGIES = ("auto", "ddp")

# Where a run lives and who watches it change nothing in its numbers.
_NOT_HYPERPARAMETERS = (
    "run_dir",
    "paths",
    "logger",
    "callbacks",
    "hydra",
    "sweep",
    "sweeps",
    "sweep_dir",
)

# Keys of the stored model that say how it is trained, not what its weights are.
_NOT_ARCHITECTURE = (
    "trunk.recompute",
    "trunk.experts.bias_rate",
    "trunk.experts.bias_frozen",
    "trunk.experts.sequence_loss",
)


def instantiate(config: DictConfig, **arguments: Any) -> Any:
    """Build the object that a config node's ``_target_`` names.

    Raises:
        ValueError: a target that conf/ does not have, an unknown key, or what the object's own
            checks refuse.
    """
    for target in _targets(OmegaConf.to_container(config, resolve=True)):
        if target not in known_targets():
            raise ValueError(
                f"_target_={target} is refused: a config may only build what this project's own "
                "conf/ builds."
            )
    try:
        return hydra.utils.instantiate(config, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        if isinstance(cause, TypeError):
            raise ValueError(f"{config.get('_target_')} refuses its settings: {cause}") from error
        raise


@cache
def known_targets() -> frozenset[str]:
    """What the files of conf/ build. A config may come from somebody else's checkpoint: it can
    build these, and nothing else. (A package's name is no guard: ``mtp_lightning.runs.os.replace``
    begins with it, too.)"""
    files = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return frozenset(match for text in files for match in _TARGET.findall(text))


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in _targets(value)]
    if isinstance(node, list):
        return [target for value in node for target in _targets(value)]
    return []


def build_data(
    cfg: DictConfig, tokenizer_state: dict[str, Any] | None = None, *, brought: bool = False
) -> TokenDataModule:
    """The data module, its token store built or found.

    Args:
        cfg: the config.
        tokenizer_state: of the run that this one starts from; by default the tokenizer is the
            config's.
        brought: it came with a trunk (:func:`adopt_trunk`), and takes the place of the config's
            unless that was asked for.
    """
    if tokenizer_state is None:
        data = instantiate(cfg.data)
    elif brought and not overridden("tokenizer"):
        data = instantiate(cfg.data, tokenizer=tokenizer_from_state(tokenizer_state))
    else:
        tokenizer = tokenizer_from_state(tokenizer_state)
        asked = instantiate(cfg.tokenizer)
        options = {k: cfg.tokenizer[k] for k in ("vocab_size", "train_bytes") if k in cfg.tokenizer}
        same = asked.kind == tokenizer.kind and all(
            tokenizer_state.get(key) == value for key, value in options.items()
        )
        if not same or (asked.kind == "pretrained" and asked.spec() != tokenizer.spec()):
            stored = {k: v for k, v in tokenizer_state.items() if k != "tokenizer_json"}
            raise ValueError(
                f"init_from={cfg.init_from} was trained with the tokenizer {stored}, which this "
                "run's tokenizer settings do not ask for: its weights mean nothing with another."
            )
        data = instantiate(cfg.data, tokenizer=tokenizer)
    data.prepare()
    return data


def build_model_config(cfg: DictConfig, vocab_size: int) -> ModelConfig:
    """Trunk and stack from the groups ``model`` and ``mtp``.

    Args:
        cfg: the config.
        vocab_size: of the tokenizer. An imported trunk may have more rows than it needs.
    """
    rows = cfg.model.get("vocab_size", vocab_size)
    if rows < vocab_size:
        raise ValueError(
            f"the tokenizer has {vocab_size} ids and the model only {rows} rows for them: "
            "use the tokenizer that the model was trained with."
        )
    trunk = instantiate(cfg.model, vocab_size=rows)
    mtp = instantiate(cfg.mtp)
    if mtp.depth > cfg.data.seq_len:
        raise ValueError(
            f"mtp.depth={mtp.depth} is larger than the window, data.seq_len={cfg.data.seq_len}: "
            "predict fewer tokens, or lengthen the window."
        )
    return ModelConfig(trunk=trunk, mtp=mtp)


def build_balance(cfg: DictConfig) -> Balance:
    """The rule of the group ``balance``; without MTP depths there is nothing to balance."""
    balance: Balance = instantiate(cfg.balance)
    if balance.depth == 0 and not isinstance(balance, NoBalance):
        log.warning("balance=%s does nothing at mtp.depth=0.", balance.name)
        return NoBalance(0)
    return balance


def build_module(cfg: DictConfig, data: TokenDataModule, *, asked: DictConfig) -> MTPModule:
    """The LightningModule, with fresh weights.

    Args:
        cfg: the config.
        data: for the vocabulary, and the tokenizer that checkpoints hold.
        asked: the config before anything was matched, which checkpoints hold: given again, it
            comes to the same layers and steps.
    """
    model_config = build_model_config(cfg, data.tokenizer.vocab_size)
    if not model_config.mtp.trains_trunk:
        weights = OmegaConf.to_container(cfg)["mtp_lambda"]  # type: ignore[index,call-overload]
        if not any(weights if isinstance(weights, list) else [weights]):
            raise ValueError(
                "mtp.freeze_trunk=true with mtp_lambda=0 leaves nothing to train: "
                "set mtp_lambda above 0."
            )
        if cfg.init_from is None:
            log.warning("mtp.freeze_trunk=true without init_from: the frozen trunk is random.")
    module = MTPModule(
        model_config,
        schedule=instantiate(cfg.lambda_schedule),
        optimizer=instantiate(cfg.optimizer),
        balance=build_balance(cfg),
        seed=cfg.seed,
        accumulate=cfg.trainer.accumulate_grad_batches,
        clip_norm=cfg.trainer.gradient_clip_val,
        bytes_per_token=data.bytes_per_token("val"),
        extra={
            "tokenizer": data.tokenizer.state(),
            "config": OmegaConf.to_container(asked, resolve=True),
        },
    )
    if cfg.trainer.compile:
        # In place, block by block: the keys of checkpoints stay what they are.
        for layer in module.modules():
            if isinstance(layer, Block):
                layer.compile()
    return module


def overridden(group: str) -> list[str]:
    """The overrides of a config group that were given on the command line of an app."""
    if not HydraConfig.initialized():
        return []
    given = [o.lstrip("+~") for o in HydraConfig.get().overrides.task]
    return [o for o in given if o.split("=")[0] == group or o.startswith(f"{group}.")]


def adopt_trunk(cfg: DictConfig, trunk: TrunkConfig, *, source: Path) -> DictConfig:
    """The config with an imported trunk in the place of ``model``; how it is trained stays.

    Raises:
        ValueError: the command line asks for another trunk.
    """
    shape = asdict(trunk)
    asked = OmegaConf.create({"model": shape})
    for override in overridden("model"):
        key = override.split("=")[0]
        found = OmegaConf.select(asked, key) if key != "model" else None
        if key.removeprefix("model.") in FREE or found == OmegaConf.select(cfg, key):
            continue
        raise ValueError(
            f"{override} does not fit init_from={source}, which brings its own trunk"
            + (f" with {key}={found}" if key != "model" else "")
            + f": leave {key}= out."
        )
    for key in FREE:
        value = OmegaConf.select(cfg.model, key)
        *parents, last = key.split(".")
        owner = shape[parents[0]] if parents else shape
        if value is not None and owner is not None:
            owner[last] = value
    cfg = cfg.copy()
    cfg.model = {"_target_": cfg.model["_target_"], **shape}
    return cfg


def match_reference(cfg: DictConfig, vocab_size: int) -> tuple[DictConfig, compare.Matched | None]:
    """The config with the layers or steps that ``compare.match`` asks for, and what was matched."""
    settings = cfg.compare
    compare.check(settings.match, settings.reference)
    if settings.match == "none":
        return cfg, None
    config = build_model_config(cfg, vocab_size)
    trainer = cfg.trainer
    batch = cfg.data.batch_size * trainer.accumulate_grad_batches
    length = {
        "seq_len": cfg.data.seq_len,
        "max_steps": trainer.max_steps,
        "tokens_per_step": batch * cfg.data.seq_len * int(trainer.devices) * trainer.num_nodes,
    }
    reference = (
        compare.plain_reference(config, **length)
        if settings.reference is None
        else compare.run_reference(settings.reference)
    )
    matched = compare.match(
        config,
        instantiate(cfg.lambda_schedule),
        balance=build_balance(cfg),
        match=settings.match,
        reference=reference,
        **length,
    )
    cfg = cfg.copy()
    cfg.model.n_layers = matched.n_layers
    cfg.trainer.max_steps = matched.max_steps
    log.info("%s.", matched)
    return cfg, matched


def build_trainer(cfg: DictConfig, *, resume_step: int | None, may_skip: bool) -> pl.Trainer:
    """The Trainer, with callbacks and loggers.

    Args:
        cfg: the config.
        resume_step: the optimizer step that the run continues from; logs after it are dropped.
        may_skip: whether some parameters get no gradient in some steps.
    """
    settings: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore
    for key in _OWN_TRAINER_KEYS:
        settings.pop(key)
    _check_choice("precision", settings["precision"], _PRECISIONS)
    _check_choice("strategy", settings["strategy"], _STRATEGIES)
    for key in ("max_steps", "val_check_interval", "log_every_n_steps"):
        value = settings[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"trainer.{key} must be a whole number of at least 1, not {value}.")
    settings["accelerator"] = pick_accelerator(settings["accelerator"])
    if settings["strategy"] == "ddp":
        settings["strategy"] = "ddp_find_unused_parameters_true" if may_skip else "ddp"
    elif settings["devices"] not in (1, "1"):
        raise ValueError(
            f"trainer.devices={settings['devices']} needs trainer.strategy=ddp: "
            "several devices train one model together by data parallelism."
        )
    plugins: list[Any] = [AtomicCheckpointIO()]
    if settings["precision"] == "64-true":
        plugins.append(TokenDoublePrecision())
        settings["precision"] = None
    loggers = [instantiate(node) for node in cfg.logger.values()]
    if resume_step is not None:
        for logger in loggers:
            logger.resume_from(resume_step)
    try:
        return pl.Trainer(
            **settings,
            default_root_dir=cfg.paths.output_dir,
            max_epochs=-1,
            # Validations are counted in optimizer steps, across epochs.
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            # The loaders shard themselves, so that their order can be resumed.
            use_distributed_sampler=False,
            enable_model_summary=False,
            logger=loggers,
            callbacks=[instantiate(node) for node in cfg.callbacks.values()],
            plugins=plugins,
        )
    except TypeError as error:
        raise ValueError(f"The trainer group has a key that Lightning refuses: {error}.") from error


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        known = ", ".join(choices)
        raise ValueError(f"trainer.{key}={value} is not supported: choose one of {known}.")


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that is ready for its trainer.

    Attributes:
        asked: the config, with the trunk that ``init_from`` brought.
        cfg: that, with the layers or steps that ``compare.match`` asked for.
        matched: what was matched; None without a match.
        data: its token store built or found.
        module: with the weights that it starts from, unless it continues.
        resume_from: the checkpoint that the run continues from; None for a new run.
        resume_step: the optimizer step stored there.
    """

    asked: DictConfig
    cfg: DictConfig
    matched: compare.Matched | None
    data: TokenDataModule
    module: MTPModule
    resume_from: Path | None
    resume_step: int | None


def prepare(cfg: DictConfig, folder: Path) -> Prepared:
    """Build a run, from scratch, from another run, or from what its folder holds.

    What is read of a checkpoint here is gone when this returns: training needs the memory.
    """
    resume_from = checkpoint_io.newest_intact(folder / CHECKPOINTS)
    stored = None if resume_from is None else checkpoint_io.load(resume_from)
    start: Start | None = None
    tokenizer_state, brings_trunk = None, False
    if cfg.init_from is not None:
        if stored is None:
            start = read_start(cfg.init_from)
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
                trunk = ModelConfig.from_dict(stored["model_config"]).trunk
                cfg = adopt_trunk(cfg, trunk, source=Path(cfg.init_from))
    asked = cfg
    data = build_data(cfg, tokenizer_state, brought=brings_trunk)
    cfg, matched = match_reference(cfg, data.tokenizer.vocab_size)
    module = build_module(cfg, data, asked=asked)
    resume_step = None
    if stored is not None:
        resume_step = check_resumable(stored, module, source=resume_from)
        log.info("Continuing %s from step %d.", folder, resume_step)
    elif start is not None:
        log.info("Starting from %s: %s.", start.path, start_from(module.model, start))
    return Prepared(
        asked=asked,
        cfg=cfg,
        matched=matched,
        data=data,
        module=module,
        resume_from=resume_from,
        resume_step=resume_step,
    )


def train(cfg: DictConfig) -> dict[str, Any]:
    """Run an experiment, or continue it where its folder holds a checkpoint.

    Returns:
        The summary: every final metric, and what the run cost; also in ``summary.json``.

    Raises:
        ValueError: settings that do not fit together, or a loss that is not finite.
        OSError: missing input, or a disk that is full.
        Stopped: on Ctrl-C or SIGTERM; the message says what was saved.
    """
    quiet_lightning()
    keep_freed_memory()
    set_threads(cfg.trainer.num_threads)
    folder = Path(cfg.paths.output_dir)
    run = prepare(cfg, folder)
    data, module = run.data, run.module
    trainer = build_trainer(
        run.cfg,
        resume_step=run.resume_step,
        may_skip=module.schedule.depth_ever_skipped or module.balance.skips,
    )
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(run.asked, folder / "config.yaml", resolve=True)
        data.tokenizer.save(folder)
    for logger in trainer.loggers:
        logger.log_hyperparams(hyperparameters(cfg))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=run.resume_from)
    except SystemExit as stop:  # how Lightning ends after Ctrl-C and SIGTERM
        signum = signal.SIGTERM if trainer.received_sigterm else signal.SIGINT
        raise Stopped(describe_interrupt(folder), signum) from stop
    if module.validated_step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)

    summary = summarise(trainer, module, data)
    if cfg.init_from is not None:
        summary["init_from"] = str(cfg.init_from)
    if run.matched is not None:
        summary["compare"] = run.matched.to_dict()
    for logger in trainer.loggers:
        final = {tag: value for tag, value in summary.items() if "/" in tag}
        logger.log_hyperparams(hyperparameters(cfg), final, trainer.global_step)
    if trainer.is_global_zero:
        write_summary(summary, folder / "summary.json")
        print_summary(summary, depth=module.model.depth)
        print_sample(module.model, data, seed=cfg.seed)
        print_paths(folder)
    return summary


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """What tells this run from its neighbours: a few keys, and all that the command line names.

    A key that names a group of the config (``mtp=parallel``) has the group's choice as its value.
    """
    keys = ["mtp.depth", "mtp_lambda", "seed"]
    choices: dict[str, Any] = {}
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        choices = dict(hydra_config.runtime.choices)
        given = [override.split("=")[0] for override in hydra_config.overrides.task]
        keys += [key.lstrip("+") for key in given if not key.startswith("~")]
    chosen: dict[str, Any] = {}
    for key in keys:
        if key.partition(".")[0] in _NOT_HYPERPARAMETERS:
            continue
        value = choices[key] if key in choices else OmegaConf.select(cfg, key)
        chosen[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    return chosen


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Metrics of a trained model, on its own validation text or on other data: teacher-forced, and
    of the decoding loop.

    Raises:
        ValueError: a damaged or foreign checkpoint, or data without a validation window.
        OSError: a missing file.
    """
    quiet_lightning()
    set_threads(cfg.num_threads)
    run = load_run(cfg.checkpoint, device=pick_accelerator(cfg.accelerator))
    data = validation_data(run, data=cfg.get("data"), cache_dir=cfg.paths.cache_dir)
    rates = evaluate_model(run.model, data.val_dataloader(), limit=cfg.limit_batches)
    per_byte = bits_per_byte(rates["loss_depth_0"], data.bytes_per_token("val"))
    metrics = {
        **{f"val/{name}": value for name, value in rates.items()},
        "val/bits_per_byte": per_byte,
        **evaluate_decoding(run.model, data, cfg.decode),
        "parameters": run.model.config.num_params(),
        "parameters_trunk": run.model.config.trunk.num_params(),
        "flops_per_token": run.model.config.flops_per_token(data.seq_len),
        "step": run.step,
        "checkpoint": str(run.path),
        "data": data.summary(),
        **environment(),
    }
    print_summary(metrics, depth=run.model.depth)
    if cfg.output is not None:
        write_summary(metrics, Path(cfg.output))
    return metrics


def validation_data(
    run: LoadedRun, *, data: DictConfig | None = None, cache_dir: str | None = None
) -> TokenDataModule:
    """The validation text of a run, or that of another data group in the run's setting.

    Args:
        run: its tokenizer reads the text.
        data: the other group.
        cache_dir: where token stores are; by default where the run's are.
    """
    config = OmegaConf.create(run.config)
    if data is not None:
        config.data = OmegaConf.to_container(data, resolve=False)
    config.paths.cache_dir = cache_dir or config.paths.cache_dir
    module = instantiate(config.data, tokenizer=run.tokenizer)
    module.prepare("validate")
    return module


def evaluate_decoding(
    model: MTPModel, data: TokenDataModule, settings: DictConfig
) -> dict[str, float]:
    """Acceptance and speed-up of the drafts, measured and expected; nothing without drafts.

    Raises:
        ValueError: settings out of range.
    """
    for key, least in (("n_prompts", 0), ("prompt_tokens", 1), ("new_tokens", 2)):
        if not isinstance(settings[key], int) or settings[key] < least:
            raise ValueError(f"decode.{key} must be at least {least}, not {settings[key]}.")
    if not model.mtp.drafts or settings.n_prompts == 0:
        return {}
    try:
        prompts = data.held_out_prompts(settings.n_prompts, settings.prompt_tokens)
    except ValueError as error:  # the teacher-forced metrics are there all the same
        log.warning("Nothing was decoded (%s): lower decode.n_prompts or prompt_tokens.", error)
        return {}
    report = decoding_report(model, prompts, new_tokens=settings.new_tokens)
    return {f"decode/{name}": value for name, value in report.items()}


def check_resumable(checkpoint: dict[str, Any], module: MTPModule, *, source: Path | None) -> int:
    """The step of a checkpoint, after making sure that it holds this very architecture.

    Raises:
        ValueError: it holds another one; the differing keys are named.
    """
    wanted = module.model.config.to_dict()
    try:  # settings that are newer than the checkpoint had their defaults
        stored = ModelConfig.from_dict(checkpoint["model_config"]).to_dict()
    except ValueError:
        stored = checkpoint["model_config"]
    differences = describe_differences(stored, wanted, ignore=_NOT_ARCHITECTURE)
    if differences:
        raise ValueError(
            f"{source} holds another architecture than this config ({'; '.join(differences)}): "
            "start in another run_dir, or go back to the settings that the run began with."
        )
    rule = checkpoint.get("balance", {"rule": "none"})["rule"]
    if rule != module.balance.name:
        raise ValueError(
            f"{source} was trained with balance={rule}, whose state balance={module.balance.name} "
            f"cannot go on from: set balance={rule}, or start in another run_dir."
        )
    changed = describe_differences(
        checkpoint["config"], module.extra["config"], ignore=("sweep_dir", "sweep.retry_failed")
    )
    if changed:
        log.warning("Continuing with changed settings: %s.", "; ".join(changed))
    return int(checkpoint["global_step"])


def summarise(trainer: pl.Trainer, module: MTPModule, data: TokenDataModule) -> dict[str, Any]:
    """Everything a reader needs to compare this run with another."""
    config = module.model.config
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    throughput = next((c.summary() for c in callbacks if isinstance(c, Throughput)), {})
    return {
        **module.validation,
        **{n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("decode/")},
        **throughput,
        "step": trainer.global_step,
        "tokens": module.tokens,
        "flops": module.flops,
        "seconds": module.seconds,
        "parameters": config.num_params(),
        "parameters_active": config.num_active_params(),
        "parameters_trunk": config.trunk.num_params(),
        "parameters_trained": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "flops_per_token": config.flops_per_token(data.seq_len),
        "world_size": trainer.world_size,
        "seed": module.extra["config"]["seed"],
        "data": data.summary(),
        **environment(),
    }
