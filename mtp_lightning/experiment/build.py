"""Builds the objects that a config describes: data, model and module."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig, OmegaConf

from data_modules.tokenizers import Tokenizer, tokenizer_from_state
from data_modules.tokenizers.base import class_of
from mtp_lightning import processes
from mtp_lightning.command_line.check_config import require_reach
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.compose import overridden
from mtp_lightning.experiment.device import holds_in_bf16
from mtp_lightning.experiment.instantiate import instantiate, trusted_packages
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.module import MTPModule
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.init import sets_everything
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.objective.objective import Objective
from mtp_lightning.objective.schedule.base import LambdaSchedule
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.base import Term
from mtp_lightning.optim.base import OptimizerConfig

if TYPE_CHECKING:
    from data_modules import WindowDataModule
    from mtp_lightning.matching import Length, Matched

log = logging.getLogger(__name__)

# Entries of a tokenizer's state that are too long for a message.
_LONG = ("tokenizer_json", "beside")


def build_data(
    cfg: DictConfig, tokenizer_state: dict[str, Any] | None = None, *, imported: bool = False
) -> WindowDataModule:
    """Build and prepare the data module, with the tokenizer that comes with the weights, or else
    the config's. One that came with an imported trunk (``imported``) may differ from the config's,
    unless the command line sets that.

    Raises:
        UserError: the tokenizer settings do not fit the data or the model of ``init_from``.
    """
    typed = overridden("tokenizer")
    if "task" in cfg.data and typed:
        raise UserError(
            f"{typed[0]} has no meaning for a task, which has symbols of its own: leave it out."
        )
    arguments = build_mtp(cfg).data_options
    if tokenizer_state is not None:
        arguments["tokenizer"] = tokenizer_from_state(tokenizer_state)
        if "task" not in cfg.data and (typed or not imported):
            _require_same_tokenizer(cfg, arguments["tokenizer"], tokenizer_state)
    elif "task" not in cfg.data:
        tokenizer = arguments["tokenizer"] = instantiate(cfg.tokenizer, kind=Tokenizer)
        if class_of(tokenizer.kind) is not type(tokenizer):
            raise UserError(
                f"tokenizer._target_={cfg.tokenizer._target_} is not a tokenizer of this project, "
                "and checkpoints are read with those alone: write yours as a tokenizer.json, and "
                "set tokenizer=pretrained tokenizer.path=FILE."
            )
    data: WindowDataModule = instantiate(cfg.data, **arguments)
    data.allow = trusted_packages(cfg)
    data.prepare()
    return data


def _require_same_tokenizer(cfg: DictConfig, tokenizer: Tokenizer, state: dict[str, Any]) -> None:
    """Refuse a config whose tokenizer settings differ from the tokenizer of the weights."""
    configured = instantiate(cfg.tokenizer)
    keys = {"vocab_size", "train_bytes", "eot_id"} & cfg.tokenizer.keys()
    same = type(configured) is type(tokenizer)  # a class of the user's may have a kind of ours
    same &= all(state.get(k) == cfg.tokenizer[k] for k in keys)
    if same and configured.kind == "pretrained":  # its file may lie anywhere
        ours, theirs = configured.state(), tokenizer.state()
        same = all(ours[k] == theirs[k] for k in ("eot_token", "tokenizer_json"))
    if not same:
        stored = {k: v for k, v in state.items() if k not in _LONG}
        raise UserError(
            f"the weights were trained with the tokenizer {stored}, which this run's tokenizer "
            "settings do not ask for: set tokenizer= to that one, since they fit no other."
        )


def build_model_config(cfg: DictConfig, vocab_size: int) -> ModelConfig:
    """Configure trunk and stack from the groups ``model`` and ``mtp``.

    Raises:
        UserError: the trunk has fewer rows than the tokenizer's ``vocab_size``, or a setting is
            refused. An imported trunk may have more rows.
    """
    rows = cfg.model.get("vocab_size", vocab_size)
    if rows < vocab_size:
        raise UserError(
            f"The tokenizer has {vocab_size} ids and the model only {rows} rows for them: "
            "use the tokenizer that the model was trained with."
        )
    trunk = instantiate(cfg.model, kind=TrunkConfig, vocab_size=rows)
    mtp = build_mtp(cfg)
    for group in ("balance", "lambda_schedule"):
        if (depth := cfg[group].get("depth", mtp.depth)) != mtp.depth:
            raise UserError(f"{group}.depth={depth} is not mtp.depth={mtp.depth}: leave it out.")
    require_reach(
        {"mtp": {"depth": mtp.depth, "stride": mtp.stride}, "data": {"seq_len": cfg.data.seq_len}}
    )
    # Every kind of stack without depths is the same model, stored under one name.
    if not (mtp.depth or mtp.answers_at_once):
        from mtp_lightning.mtp.none import NoMTPConfig

        mtp = NoMTPConfig()
    return ModelConfig(trunk=trunk, mtp=mtp)


def build_mtp(cfg: DictConfig) -> MTPConfig:
    """Configure the stack from the group ``mtp``. A setting that is not allowed raises a
    :class:`UserError`."""
    options: dict[str, Any] = {"confidence": True} if cfg.objective.get("confidence") else {}
    if cfg.mtp.get("weights", "") is None:  # of mtp=bag
        options["weights"] = "none" if "task" in cfg.data else "idf"
    return instantiate(cfg.mtp, kind=MTPConfig, **options)


def build_balance(cfg: DictConfig) -> Balance:
    """Build the rule of the group ``balance``. Without MTP depths, it is :class:`NoBalance`."""
    balance: Balance = instantiate(cfg.balance, kind=Balance)
    if balance.depth == 0 and not isinstance(balance, NoBalance):
        log.warning("balance=%s does nothing at mtp.depth=0.", balance.name)
        return NoBalance(0)
    return balance


def build_objective(cfg: DictConfig) -> Objective:
    """Build the objective: the term that the group ``objective`` names, and the keys that all terms
    share (conf/objective/base.yaml)."""
    node = cfg.objective
    options = {key: node[key] for key in Objective.options() if key in node}
    own = OmegaConf.masked_copy(node, [k for k in node if k not in options])
    own._set_parent(cfg)  # for ${mtp.depth} and the like
    own._set_key("objective")
    return Objective(term=instantiate(own, kind=Term), **options)


def build_module(cfg: DictConfig, data: WindowDataModule, *, stored: DictConfig) -> MTPModule:
    """Build the LightningModule with fresh weights; refuse settings that do not fit together.
    Checkpoints hold the tokenizer of the data, and ``stored``: the config before matching, which
    gives the same layers and steps again."""
    model_config = build_model_config(cfg, data.tokenizer.vocab_size)
    objective = build_objective(cfg)
    _refuse_unfit(cfg, model_config.mtp, data, objective)
    balance = build_balance(cfg)
    if balance.scope is not None:
        processes.require_whole_gradients(cfg.trainer, f"balance={balance.name}")
    if model_config.mtp.depth == 0 and any(term.needs_teacher for _, term in objective.terms):
        log.warning("objective=%s does nothing at mtp.depth=0.", objective.term.name)
    model, deferred = _new_model(
        model_config,
        cfg.seed,
        deferred=cfg.trainer.strategy == "fsdp" and cfg.init_from is None,
        half=holds_in_bf16(cfg.trainer, model_config.mtp),
    )
    step = OptimizerStep(
        model,
        schedule=build_schedule(cfg),
        balance=balance,
        objective=objective,
        seed=cfg.seed,
        accumulate=cfg.trainer.accumulate_grad_batches,
        clip_norm=cfg.trainer.gradient_clip_val,
    )
    optimizer = instantiate(cfg.optimizer, kind=OptimizerConfig)
    _warn_of_low_rates(optimizer, cfg.trainer.max_steps)
    module = MTPModule(
        step,
        optimizer=optimizer,
        deferred=deferred,
        text_bytes=data.evaluated_bytes,
        extra={
            "tokenizer": data.tokenizer.state(),
            "data": data.summary()["fingerprint"],
            "config": OmegaConf.to_container(stored, resolve=True),
        },
    )
    module.model.mtp.observe_training_text(data)
    if cfg.trainer.precision == "64-true":
        # Lightning does it only after loading a checkpoint, whose weights it would round.
        module.double()
    if cfg.trainer.compile is True:
        module.model.compile_blocks()
    return module


def _new_model(
    config: ModelConfig, seed: int, *, deferred: bool, half: bool
) -> tuple[MTPModel, bool]:
    """A model with fresh weights, and whether they are still to be drawn. If ``deferred``, they are
    drawn after sharding, where the model allows it, so that each rank stores only its shard. If
    ``half``, the matrices of the frozen trunk are held in bf16."""
    with torch.device("meta") if deferred else nullcontext():
        model = MTPModel(config)
    if deferred and not sets_everything(model):
        model, deferred = MTPModel(config), False
    if half:
        model.trunk.hold_in_bf16()
    if not deferred:
        model.initialize(seed)
    return model, deferred


def _refuse_unfit(
    cfg: DictConfig, mtp: MTPConfig, data: WindowDataModule, objective: Objective
) -> None:
    """Refuse a stack that the data or the settings do not fit."""
    if not mtp.trains_trunk:
        weights = OmegaConf.to_container(cfg)["mtp_lambda"]  # type: ignore[index,call-overload]
        if not any(weights if isinstance(weights, list) else [weights]):
            raise UserError(
                "mtp.freeze_trunk=true with mtp_lambda=0 leaves nothing to train: "
                "set mtp_lambda above 0."
            )
        if cfg.init_from is None:
            log.warning("mtp.freeze_trunk=true without init_from: the frozen trunk is random.")
    if mtp.init != "random" and cfg.init_from is None:
        raise UserError(
            f"mtp.init={mtp.init} has no trunk to begin from: set init_from, or leave mtp.init out."
        )
    if mtp.answers_at_once and not data.scores_answers:
        raise UserError(
            f"mtp={mtp.variant} hides the answers from the model, so it needs a task "
            "(data=star_graph, copy, ..) without data.train_prompt."
        )
    mtp.check_window(data.seq_len)
    has_teacher = any(term.needs_teacher for _, term in objective.terms)
    if (has_teacher or mtp.confidence) and mtp.depth and mtp.depth * mtp.stride >= data.seq_len:
        setting = objective.setting if has_teacher else "objective.confidence=true"
        raise UserError(
            f"{setting} compares depth {mtp.depth} with the main prediction of the same token, "
            f"which lies after the window of data.seq_len={data.seq_len}: predict fewer tokens, or "
            "lengthen the window."
        )


def _warn_of_low_rates(optimizer: OptimizerConfig, max_steps: int) -> None:
    steps = range(0, max_steps, max(1, max_steps // 1000))
    highest = max((optimizer.schedule(step, max_steps) for step in steps), default=1.0)
    if highest < 0.99:
        log.warning(
            "The learning rate reaches only %.0f %% of its peak: the warm-up and the decay of "
            "optimizer.schedule are long for trainer.max_steps=%d.",
            100 * highest,
            max_steps,
        )


def build_schedule(cfg: DictConfig) -> LambdaSchedule:
    """Build the lambda schedule, with the name of its function or class."""
    schedule = instantiate(cfg.lambda_schedule, kind=LambdaSchedule)
    schedule.name = str(cfg.lambda_schedule._target_).rpartition(".")[2]
    return schedule


def _length(cfg: DictConfig) -> Length:
    """The length of a run; errors as in :func:`apply_match`."""
    from mtp_lightning.matching import Length

    trainer = cfg.trainer
    if not str(trainer.devices).isdigit():
        raise UserError(
            f"compare.match={cfg.compare.match} counts the tokens of a step, and trainer.devices="
            f"{trainer.devices} does not say on how many devices: give their number."
        )
    processes = int(trainer.devices) * trainer.num_nodes
    windows = cfg.data.batch_size * trainer.accumulate_grad_batches * processes
    return Length(
        seq_len=cfg.data.seq_len,
        max_steps=trainer.max_steps,
        tokens_per_step=windows * cfg.data.seq_len,
        stored_states=cfg.data.get("cache_states", False),
    )


def training_flops(cfg: DictConfig, vocab_size: int) -> float:
    """FLOPs of a run's training, over all its processes, with the layers or steps that
    ``compare.match`` sets. Errors as in :func:`apply_match`."""
    from mtp_lightning.matching import total_flops
    from mtp_lightning.objective.cost import StepCost

    cfg, _ = apply_match(cfg, vocab_size)
    cost = StepCost(build_model_config(cfg, vocab_size), build_objective(cfg))
    return total_flops(cost, build_schedule(cfg), _length(cfg), build_balance(cfg))


def apply_match(cfg: DictConfig, vocab_size: int) -> tuple[DictConfig, Matched | None]:
    """Set the layers or steps that ``compare.match`` asks for; return the config, and the result of
    the match (None without a match).

    Raises:
        FileNotFoundError: the reference is not the folder of a finished run.
        UserError: the settings do not fit together, or cannot be matched.
    """
    if cfg.compare.match == "none":
        return cfg, None
    from mtp_lightning.matching import follows_tokens, match, plain_reference, run_reference

    config, length = build_model_config(cfg, vocab_size), _length(cfg)
    schedule, rule, objective = build_schedule(cfg), build_balance(cfg), build_objective(cfg)
    kind, folder = cfg.compare.match, cfg.compare.reference
    reference = plain_reference(config, length) if folder is None else run_reference(folder)
    matched = match(
        config, schedule, length, match=kind, reference=reference, balance=rule, objective=objective
    )
    masked = "task" in cfg.data or cfg.data.get("document_mask")
    if kind == "flops" and masked and follows_tokens(schedule, length, matched.max_steps):
        raise UserError(
            "compare.match=flops counts positions and a lambda_schedule in tokens only targets, "
            "which not all positions of this data have: set lambda_schedule.unit=steps or fraction."
        )
    cfg = cfg.copy()
    cfg.model.n_layers = matched.n_layers
    cfg.trainer.max_steps = matched.max_steps
    log.info("%s.", matched)
    return cfg, matched
