"""A run's start: fresh weights, a checkpoint that it continues or branches from, or another model.

A run whose folder holds a checkpoint continues from it. ``branch_from`` loads the whole state of
another run, and ``init_from`` only the weights of a model (``init_from.py``).
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.experiment.command_line import overridden
from mtp_lightning.experiment.instantiate import trusted_packages
from mtp_lightning.model import ModelConfig
from mtp_lightning.module import MTPModule
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.processes import Peers
from mtp_lightning.run import checkpoints
from mtp_lightning.run.config import WITHOUT_BEARING, describe_differences, flatten, read_yaml
from mtp_lightning.run.layout import CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE
from mtp_lightning.stored import require_text, targets

if TYPE_CHECKING:
    from data_modules import WindowDataModule
    from data_modules.windows import WindowBatch
    from mtp_lightning.opening import StoredModel

log = logging.getLogger(__name__)

_CONTINUING = "Continuing %s from step %d."
# Most differences of two architectures that one message lists.
_SHOWN = 3

# The tokens on which mtp.init=last_block measures the trunk. More would take longer than they gain.
BEGINNING_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a run starts from. All fields are empty for a fresh run.

    Attributes:
        checkpoint: the file that the run continues or branches from.
        content: the content of that file. Its tensors are read when they are used.
        branches: whether the checkpoint belongs to another run.
        start: the model of ``init_from``; None once the run has a checkpoint.
        tokenizer_state: the state of the tokenizer that comes with the model.
        trunk: the imported trunk, which replaces the config's; None builds the config's own.
    """

    checkpoint: Path | None = None
    content: dict[str, Any] | None = None
    branches: bool = False
    start: StoredModel | None = None
    tokenizer_state: dict[str, Any] | None = None
    trunk: TrunkConfig | None = None

    def weights(self) -> dict[str, torch.Tensor]:
        """The model's weights in the checkpoint."""
        from mtp_lightning.run.loading import model_weights

        assert self.content is not None and self.checkpoint is not None
        return model_weights(checkpoints.filled(self.content, self.checkpoint))


def find_origin(config: DictConfig, folder: Path, peers: Peers) -> Origin:
    """Find what a run starts from. All processes of the run get the same answer.

    Args:
        config: the run's config.
        folder: the run's folder.
        peers: the run's processes.

    Raises:
        UserError: the folder's run has removed its checkpoints, or the start cannot be used.
        OSError: the start does not exist.
    """
    name = peers.told("resume", lambda: _newest(folder))
    if name is None and _kept_none(folder):
        raise UserError(
            f"{folder} holds a finished run that kept no checkpoint to continue from: take another "
            "run_dir."
        )
    checkpoint = None if name is None else folder / CHECKPOINTS / name
    branches = name is None and config.branch_from is not None
    if branches:
        from mtp_lightning.experiment.branching import branch_point

        checkpoint = Path(peers.told("branch", lambda: str(branch_point(config.branch_from))))
    # mapped skips the checksums, which _newest or branch_point has just compared.
    content = None if checkpoint is None else checkpoints.load(checkpoint, mapped=True)
    found = Origin(checkpoint=checkpoint, content=content, branches=branches)
    return found if config.init_from is None else _with_model(found, config)


def _with_model(found: Origin, config: DictConfig) -> Origin:
    """Add the model of ``init_from`` to the origin. A run that has a checkpoint takes the model
    from there, since the original may have changed or be gone."""
    from mtp_lightning.opening import read_model
    from mtp_lightning.run.loading import brought_trunk

    allow = trusted_packages(config)
    start: StoredModel | None = None
    if found.content is None:
        start = read_model(config.init_from, allow=allow)
        state, brings, trunk = start.tokenizer_state, start.brings_trunk, start.config.trunk
    else:
        state, brings = found.content.get("tokenizer"), brought_trunk(found.content)
        if brings:
            trunk = ModelConfig.from_dict(found.content["model_config"], allow=allow).trunk
    if start is not None and brings and state is None:
        log.warning(
            "%s holds no tokenizer.json: this run's own tokenizer settings are used, "
            "which must be those that the model was trained with.",
            start.path,
        )
    return replace(found, start=start, tokenizer_state=state, trunk=trunk if brings else None)


def _newest(folder: Path) -> str | None:
    path = checkpoints.newest_intact(folder / CHECKPOINTS)
    return None if path is None else path.name


def _kept_none(folder: Path) -> bool:
    """Whether a folder holds a finished run with ``callbacks.checkpoints.keep=none``."""
    if not ((folder / SUMMARY_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        return False
    own = read_yaml(folder / CONFIG_FILE)
    return isinstance(own, dict) and flatten(own).get("callbacks.checkpoints.keep") == "none"


def recall_data(config: DictConfig, origin: Origin) -> DictConfig:
    """Return a continuing run's config with the digest of the model that generated its data.

    With the digest, the model itself need not be read: it may be gone, or trained further.
    """
    before = {} if origin.content is None else origin.content.get("config", {}).get("data", {})
    same = "weights" in config.data and before.get("model") == config.data.model
    if same and config.data.weights is None:
        require_text(before.get("weights"), source="the run's checkpoint")
        config = config.copy()
        config.data.weights = before.get("weights")
    return config


def adopt_trunk(config: DictConfig, origin: Origin) -> DictConfig:
    """Return the config with an imported trunk as its ``model``. Keys of training, such as dropout,
    keep the config's values.

    Raises:
        UserError: the command line asks for another trunk.
    """
    if origin.trunk is None:
        return config
    from mtp_lightning.init_from import free_keys

    trunk = origin.trunk
    source = config.init_from if origin.start is None else origin.start.path
    # The imported config becomes part of this run's config, from which any class may be built.
    if foreign := targets(asdict(trunk)):
        raise UserError(f"init_from={source} is refused: its trunk asks for {foreign[0]}.")
    shape, free = _with_targets(trunk), free_keys(trunk)
    asked = OmegaConf.create({"model": shape})
    for override in overridden("model"):
        key = override.split("=")[0]
        found = OmegaConf.select(asked, key) if key != "model" else None
        if key.removeprefix("model.") in free or found == OmegaConf.select(config, key):
            continue
        raise UserError(
            f"{override} does not fit init_from={source}, which brings its own trunk"
            + (f" with {key}={found}" if key != "model" else "")
            + f": leave {key}= out."
        )
    for key in free:
        value = OmegaConf.select(config.model, key)
        *parents, last = key.split(".")
        owner = shape[parents[0]] if parents else shape
        if value is not None and last in owner:
            owner[last] = value
    config = config.copy()
    config.model = {"_target_": config.model["_target_"], **shape}
    return config


def _with_targets(trunk: TrunkConfig) -> dict[str, Any]:
    """Write a trunk's config as the group ``model`` does: each layer with its ``_target_``."""
    layers = {
        layer.family: {"_target_": f"{type(layer).__module__}.{type(layer).__qualname__}"}
        for layer in (trunk.attention, trunk.feed_forward)
    }
    return {
        name: {**layers[name], **value} if name in layers else value
        for name, value in asdict(trunk).items()
    }


def begin_module(
    module: MTPModule, data: WindowDataModule, origin: Origin, stored: DictConfig, folder: Path
) -> int | None:
    """Load the weights of ``init_from`` into a module, or check that the checkpoint fits it.

    Args:
        module: with fresh weights.
        data: the run's data, on which ``mtp.init=last_block`` measures the trunk.
        origin: what the run starts from.
        stored: the config that checkpoints hold.
        folder: the run's folder.

    Returns:
        The optimizer step of the checkpoint, whose weights Lightning loads later; None without a
        checkpoint.

    Raises:
        UserError: the model or the checkpoint does not fit.
    """
    if origin.content is not None:
        step = check_resumable(origin.content, module, source=origin.checkpoint)
        if origin.branches:
            from mtp_lightning.experiment.branching import check_branch

            check_branch(origin.content, stored, allow=trusted_packages(stored))
            log.info("Branching from %s at step %d.", origin.checkpoint, step)
        else:
            _say_changes(origin.content, module)
            over = step >= stored.trainer.max_steps
            said = "%s has all its %d steps: evaluating it again." if over else _CONTINUING
            log.info(said, folder, step)
        return step
    if origin.start is not None:
        from mtp_lightning.init_from import start_from

        begins = module.model.config.mtp.init != "random"
        windows = beginning_windows(data) if begins else None
        inherited = start_from(module.model, origin.start, windows)
        log.info("Starting from %s: %s.", origin.start.path, inherited)
    return None


def beginning_windows(data: WindowDataModule) -> WindowBatch:
    """Training windows at even distances in the corpus, about :data:`BEGINNING_TOKENS` positions in
    total. They do not depend on the run's seed, batch size or number of processes."""
    dataset = data.train_dataloader().dataset
    rows = min(len(dataset), -(-BEGINNING_TOKENS // data.seq_len))
    return dataset[np.linspace(0, len(dataset) - 1, rows).astype(np.int64)]


def check_resumable(checkpoint: dict[str, Any], module: MTPModule, *, source: Path | None) -> int:
    """Check that a run can continue from a checkpoint, and return the checkpoint's optimizer step.

    Raises:
        UserError: it holds another architecture (the message names the keys that differ), another
            balance rule, or weights alone.
    """
    config = module.model.config
    free = ["mtp.init", *(f"trunk.{key}" for key in config.trunk.training_keys)]
    stored = checkpoint["model_config"]
    begun = stored["mtp"].get("init", "random")
    if begun != config.mtp.init:
        raise UserError(
            f"{source} is of a run whose modules began with mtp.init={begun}, and a run that "
            f"continues cannot change it to mtp.init={config.mtp.init}: set mtp.init={begun}, or "
            "start in another run_dir."
        )
    differences = describe_differences(stored, config.to_dict(), ignore=free)
    if differences:
        differences.sort(key=lambda told: ".variant:" not in told)  # says most
        more = [f"and {n} more"] if (n := len(differences) - _SHOWN) > 0 else []
        told = "; ".join([*differences[:_SHOWN], *more])
        raise UserError(
            f"{source} holds another architecture than this config ({told}): "
            "start in another run_dir, or go back to the settings that the run began with."
        )
    if checkpoint.get("optimizer_states") == []:
        raise UserError(
            f"{source} holds the weights alone (callbacks.checkpoints.keep=weights), from which no "
            "run can continue: start another run with init_from."
        )
    rule = checkpoint["balance"]["rule"]
    if rule != module.balance.name:
        raise UserError(
            f"{source} was trained with balance={rule}, whose state balance={module.balance.name} "
            f"cannot use: set balance={rule}, or start in another run_dir."
        )
    return int(checkpoint["global_step"])


def _say_changes(checkpoint: dict[str, Any], module: MTPModule) -> None:
    changed = describe_differences(
        checkpoint["config"], module.extra["config"], ignore=WITHOUT_BEARING
    )
    if changed:
        log.warning("Continuing with changed settings: %s.", "; ".join(changed))
