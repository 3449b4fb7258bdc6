"""A run's start: fresh weights, a checkpoint that it continues or branches from, or another model.

A run whose folder holds a checkpoint continues from it. ``branch_from`` loads the whole state of
another run, and ``init_from`` only the weights of a model (``init_from.py``).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from mtp_lightning.command_line.conf_comments import value_at
from mtp_lightning.errors import UserError, counted
from mtp_lightning.experiment.instantiate import trusted_packages
from mtp_lightning.model import ModelConfig
from mtp_lightning.module import MTPModule
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.processes import Peers
from mtp_lightning.run import checkpoints
from mtp_lightning.run.config import NOT_TRAINING, describe_differences, lies_in, read_yaml
from mtp_lightning.run.layout import CHECKPOINTS, CONFIG_FILE, LAST, SUMMARY_FILE
from mtp_lightning.stored import require_text

if TYPE_CHECKING:
    from mtp_lightning.weights import StoredModel

log = logging.getLogger(__name__)

# Settings that act in training steps alone.
_ONLY_TRAINING = (
    *("seed", "mtp_lambda", "lambda_schedule", "balance", "objective", "optimizer"),
    *("data.batch_size", "data.accumulate"),
    *("trainer.accumulate_grad_batches", "trainer.gradient_clip_val"),
)
# Most differences of two architectures that one message lists.
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run starts from. All fields are empty for a fresh run."""

    checkpoint: Path | None = None  # the file that the run continues or branches from
    content: dict[str, Any] | None = None  # of that file; tensors are read when they are used
    branches: bool = False  # whether the checkpoint belongs to another run
    start: StoredModel | None = None  # the model of init_from; None once there is a checkpoint
    tokenizer_state: dict[str, Any] | None = None  # of the tokenizer that comes with the weights
    trunk: TrunkConfig | None = None  # the imported one, which replaces the config's


def find_origin(config: DictConfig, folder: Path, peers: Peers) -> Origin:
    """Find what a run starts from. All processes of the run get the same answer.

    Raises:
        UserError: the folder's run has removed its checkpoints, or the start cannot be used.
        OSError: the start does not exist.
    """
    name = peers.broadcast("resume", lambda: _newest(folder))
    if name != LAST and _kept_none(folder):  # a kept step is not the run's end
        raise UserError(
            f"{folder} holds a finished run that kept no checkpoint: take another run_dir."
        )
    checkpoint = None if name is None else folder / CHECKPOINTS / name
    branches = name is None and config.branch_from is not None
    if branches:
        from mtp_lightning.run.loading import checkpoint_of_step

        found = peers.broadcast("branch", lambda: str(checkpoint_of_step(config.branch_from)))
        checkpoint = Path(found)
    # mapped skips the checksums, which _newest or checkpoint_of_step has just compared.
    content = None if checkpoint is None else checkpoints.load(checkpoint, mapped=True)
    if content is not None and not {"model_config", "config"} <= content.keys():
        raise UserError(f"{checkpoint} is of another program: take another run_dir or branch_from.")
    origin = Origin(checkpoint=checkpoint, content=content, branches=branches)
    allow = trusted_packages(config)
    if content is not None:
        # Tokenizer and imported trunk are the checkpoint's: their files may have changed since.
        if config.init_from is None and "path" not in config.tokenizer:
            return origin
        from mtp_lightning.run.loading import has_imported_trunk

        trunk = None
        if has_imported_trunk(content):
            trunk = ModelConfig.from_dict(content["model_config"], allow=allow).trunk
        return replace(origin, tokenizer_state=content.get("tokenizer"), trunk=trunk)
    if config.init_from is None:
        return origin
    from mtp_lightning.opening import read_model

    start = read_model(config.init_from, allow=allow)
    if start.brings_trunk and start.tokenizer_state is None:
        log.warning(
            "%s holds no tokenizer.json: this run's own tokenizer settings are used, "
            "which must be those that the model was trained with.",
            start.path,
        )
    trunk = start.config.trunk if start.brings_trunk else None
    return replace(origin, start=start, tokenizer_state=start.tokenizer_state, trunk=trunk)


def _newest(folder: Path) -> str | None:
    path = checkpoints.newest_intact(folder / CHECKPOINTS)
    if path is None and (found := list((folder / CHECKPOINTS).glob("[!.]*.ckpt"))):
        # Training from the first step would overwrite them.
        raise UserError(
            f"{folder} holds {counted(len(found), 'checkpoint')} that cannot be read (see above): "
            "take another run_dir, or remove its folder checkpoints to begin again."
        )
    return None if path is None else path.name


def _kept_none(folder: Path) -> bool:
    """Whether a folder holds a finished run with ``callbacks.checkpoints.keep=none``."""
    if not ((folder / SUMMARY_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return False
    return value_at(read_yaml(folder / CONFIG_FILE), "callbacks.checkpoints.keep") == "none"


def restore_data_digest(config: DictConfig, origin: Origin) -> DictConfig:
    """Return a continuing run's config with the digest of the model that generated its data. The
    model itself, which may be gone or trained further, is then not read."""
    stored = value_at(origin.content, "config.data")
    same_model = "weights" in config.data and value_at(stored, "model") == config.data.model
    if same_model and config.data.weights is None:
        weights = value_at(stored, "weights")
        require_text(weights, source="the run's checkpoint")
        config = config.copy()
        config.data.weights = weights
    return config


def check_continues(
    module: MTPModule, origin: Origin, stored: DictConfig, folder: Path, *, steps: int
) -> int:
    """Check that a run can continue or branch from the checkpoint of its origin.

    Args:
        module: with fresh weights; its ``extra["changed"]`` is set to the changes of settings.
        stored: the config that checkpoints hold.
        steps: optimizer steps of the run, which ``compare.match`` may have changed.

    Returns:
        The optimizer step of the checkpoint, whose weights Lightning loads later.

    Raises:
        UserError: the checkpoint does not fit.
    """
    assert origin.content is not None
    step = check_resumable(origin.content, module, source=origin.checkpoint)
    changes = [*origin.content.get("changed", ())]  # of this run before, or of its parent
    if origin.branches:
        from mtp_lightning.experiment.branching import check_branch

        check_branch(origin.content, stored, allow=trusted_packages(stored))
    elif changed := describe_differences(
        origin.content["config"], module.extra["config"], ignore=NOT_TRAINING
    ):
        idle = [line for line in changed if lies_in(line.partition(":")[0], _ONLY_TRAINING)]
        if step >= steps and idle:
            raise UserError(
                f"{folder} has all its {step} steps, so a change would have no effect "
                f"({'; '.join(idle)}): start in another run_dir, or raise trainer.max_steps."
            )
        log.warning("Continuing with changed settings: %s.", "; ".join(changed))
        if step < steps:
            changes.append(f"at step {step}: {'; '.join(changed)}")
    module.extra |= {"changed": changes} if changes else {}
    # Checkpoints from before this check do not say what they were trained on.
    if origin.content.get("data") not in (None, module.extra["data"]):
        raise UserError(
            f"{origin.checkpoint} was trained on other data: a text, its tokenizer or a "
            "setting of them has changed since. Go back to those, or start in another run_dir "
            "(init_from=RUN begins with the weights)."
        )
    if origin.branches:
        log.info("Branching from %s at step %d.", origin.checkpoint, step)
    elif step < steps:
        log.info("Continuing %s from step %d.", folder, step)
    else:
        log.info("%s has all its %d steps: evaluating it again.", folder, step)
    return step


def check_resumable(checkpoint: dict[str, Any], module: MTPModule, *, source: Path | None) -> int:
    """Check that a run can continue from a checkpoint, and return the checkpoint's optimizer step.

    Raises:
        UserError: it holds another architecture (the message names the keys that differ), another
            balance rule or optimizer, or weights alone.
    """
    config = module.model.config
    free = ["mtp.init", *(f"trunk.{key}" for key in config.trunk.training_keys)]
    stored = checkpoint["model_config"]
    stored_init = stored["mtp"].get("init", "random")
    if stored_init != config.mtp.init:
        raise UserError(
            f"{source} is of a run that began with mtp.init={stored_init}, not {config.mtp.init}: "
            f"set mtp.init={stored_init}, or start in another run_dir."
        )
    differences = describe_differences(stored, config.to_dict(), ignore=free)
    if differences:
        differences.sort(key=lambda line: ".variant:" not in line)  # it explains most of the others
        more = [f"and {n} more"] if (n := len(differences) - _SHOWN) > 0 else []
        shown = "; ".join([*differences[:_SHOWN], *more])
        raise UserError(
            f"{source} holds another architecture than this config ({shown}): go back to the "
            "settings of that run, or start in another run_dir (init_from=RUN takes its trunk)."
        )
    if checkpoint.get("optimizer_states") == []:
        raise UserError(
            f"{source} holds the weights alone (callbacks.checkpoints.keep=weights), from which no "
            "run can continue: start another run with init_from."
        )
    kinds = (c["optimizer"]["_target_"] for c in (checkpoint["config"], module.extra["config"]))
    before, now = (kind.rpartition(".")[2] for kind in kinds)
    if before != now:
        raise UserError(
            f"{source} holds the state of another optimizer ({before}, not {now}): go back to "
            "optimizer= as the run began, or start in another run_dir."
        )
    rule = checkpoint["balance"]["rule"]
    if rule != module.balance.name:
        raise UserError(
            f"{source} was trained with balance={rule}, whose state balance={module.balance.name} "
            f"cannot use: set balance={rule}, or start in another run_dir."
        )
    return int(checkpoint["global_step"])
