"""Starts a new run from the weights and tokenizer of a trained model, without its progress.

The model is anything that :func:`~mtp_lightning.opening.read_model` reads: another run, whose trunk
must have the same config, or an imported model, which brings the trunk's config too. The MTP stack
may differ. Modules that the trained model lacks start with new weights, and modules that the new
model lacks are dropped; a log message lists both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.compose import overridden
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.last_block import read_text
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.run.config import describe_differences
from mtp_lightning.stored import targets
from mtp_lightning.weights import Stored, StoredModel, load_weights

if TYPE_CHECKING:
    from data_modules import WindowDataModule

log = logging.getLogger(__name__)

# Tokens on which mtp.init=last_block measures the trunk. More would cost more time than they save.
_BEGINNING_TOKENS = 8192
# Keys of a stack that change how its modules are trained, not their tensors.
_TRAINING = ("init", "freeze_trunk", "detach")


def adopt_trunk(config: DictConfig, trunk: TrunkConfig, start: StoredModel | None) -> DictConfig:
    """Return the config with an imported trunk as its ``model``. Keys of training, such as
    ``model.recompute``, keep the config's values. Messages name ``start``, the model that the trunk
    comes from (None for one of a checkpoint).

    Raises:
        UserError: the command line asks for another trunk.
    """
    source = config.init_from if start is None else start.path
    # The imported config becomes part of this run's config, from which any class may be built.
    if foreign := targets(asdict(trunk)):
        raise UserError(f"init_from={source} is refused: its trunk asks for {foreign[0]}.")
    shape, free = _with_targets(trunk), free_keys(trunk)
    imported = OmegaConf.create({"model": shape})
    for override in overridden("model"):
        key = override.split("=")[0]
        value_there = OmegaConf.select(imported, key) if key != "model" else None
        if key.removeprefix("model.") in free or value_there == OmegaConf.select(config, key):
            continue
        raise UserError(
            f"{override} does not fit init_from={source}, which brings its own trunk"
            + (f" with {key}={value_there}" if key != "model" else "")
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


def load_start(model: MTPModel, start: StoredModel, data: WindowDataModule) -> None:
    """Load the weights of ``start`` into a freshly initialized model, and log which modules have
    them. ``mtp.init=last_block`` measures the trunk on training windows of ``data``. The errors are
    those of :func:`start_from`."""
    windows = None
    if model.config.mtp.init != "random":
        # At even distances in the corpus, whatever the run's seed, batch size and processes are.
        dataset = data.training
        rows = min(len(dataset), -(-_BEGINNING_TOKENS // data.seq_len))
        windows = dataset[np.linspace(0, len(dataset) - 1, rows).astype(np.int64)]
    modules = start_from(model, start, windows)
    remarks = [f"; {state}: {', '.join(names)}" for state, names in modules.items() if names]
    log.info("Starting from %s: trunk and head kept%s.", start.path, "".join(remarks))


def start_from(
    model: MTPModel, start: StoredModel, windows: WindowBatch | None = None
) -> dict[str, list[str]]:
    """Load the weights of ``start`` into a freshly initialized model. Modules that ``start`` lacks
    are initialized by ``mtp.init``; ``last_block`` reads ``windows``, which is training text. The
    result is that of :func:`check_start`; the errors are its own and those of
    :func:`~mtp_lightning.weights.load_weights`."""
    modules = check_start(model, start)
    kept, new = modules["kept"], modules["new"]
    stored: dict[str, torch.Tensor | Stored] = {
        name: tensor
        for name, tensor in start.weights.items()
        if _module(name) is None or _module(name) in kept
    }
    stored |= {name: tensor for name, tensor in model.state_dict().items() if _module(name) in new}
    load_weights(model, stored, source=str(start.path))
    text = None if windows is None else read_text(model.trunk, model.mtp, windows)
    fresh = [int(name.rpartition(".")[2]) for name in new if name.startswith("mtp.depths.")]
    model.mtp.init_from_trunk(fresh, model.trunk, model.head, text)
    return modules


def check_start(model: MTPModel, start: StoredModel) -> dict[str, list[str]]:
    """Check that a model, also one on the ``meta`` device, can start from another.

    Returns:
        Names of the stack's modules: ``kept`` start from trained weights, ``new`` from new ones,
        and ``dropped`` are those of ``start`` that this model does not have.

    Raises:
        UserError: the trunks differ, the stack's weights mean something else under this config or
            have other shapes, or ``mtp.init`` has no module to initialize.
    """
    old, wanted = start.config, model.config
    differences = describe_differences(
        old.to_dict()["trunk"], wanted.to_dict()["trunk"], ignore=free_keys(wanted.trunk)
    )
    if differences:
        raise UserError(
            f"init_from={start.path} has another trunk than this run ({'; '.join(differences)}): "
            "choose the model and tokenizer settings that it was trained with."
        )
    same_stack = old.mtp.variant == wanted.mtp.variant
    if same_stack:
        _check_meaning(start.path, old, wanted)
    weights = model.state_dict()
    old_modules, own_modules = _modules(start.weights), _modules(weights)
    kept = [name for name in own_modules if same_stack and name in old_modules]
    _check_shapes(start, wanted, weights, kept)
    new = [name for name in own_modules if name not in kept]
    if wanted.mtp.init != "random" and not new:
        raise UserError(
            f"mtp.init={wanted.mtp.init} has no effect: init_from={start.path} holds every module "
            "of this run; set mtp.init=random."
        )
    return {"kept": kept, "new": new, "dropped": [m for m in old_modules if m not in kept]}


def free_keys(trunk: TrunkConfig) -> list[str]:
    """The dotted keys of a trunk in which a run may differ from the model that it starts from."""
    return ["init_std", *trunk.training_keys]


def _check_meaning(path: Path, old: ModelConfig, wanted: ModelConfig) -> None:
    for name in wanted.mtp.meaning:
        values = getattr(old.mtp, name), getattr(wanted.mtp, name)
        if values[0] != values[1] and old.mtp.depth and wanted.mtp.depth:
            stored, configured = (v if isinstance(v, str) else json.dumps(v) for v in values)
            raise UserError(
                f"init_from={path} was trained with mtp.{name}={stored}, and its modules mean "
                f"something else under mtp.{name}={configured}: set mtp.{name}={stored}."
            )


def _check_shapes(
    start: StoredModel, wanted: ModelConfig, fresh: Mapping[str, torch.Tensor], kept: Sequence[str]
) -> None:
    """Refuse modules that a setting of the stack made of other tensors, with that setting."""
    old, new = start.config.to_dict()["mtp"], wanted.to_dict()["mtp"]
    # The depth is the size of some modules, and of others only their number.
    differences = describe_differences(
        old, new, ignore=[*_TRAINING, "depth"]
    ) or describe_differences(old, new, ignore=_TRAINING)
    for module in kept:
        stored_shapes, shapes = (
            {name: tensor.shape for name, tensor in weights.items() if _module(name) == module}
            for weights in (start.weights, fresh)
        )
        if stored_shapes != shapes and differences:
            settings = "; ".join(f"mtp.{difference}" for difference in differences)
            raise UserError(
                f"init_from={start.path} has {module} of another form than this run ({settings}): "
                "set these keys as it was trained with."
            )


def _module(name: str) -> str | None:
    """``mtp.depths.1.block.out.weight`` -> ``mtp.depths.1``; None outside the stack."""
    return ".".join(name.split(".")[:3]) if name.startswith("mtp.") else None


def _modules(weights: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(filter(None, map(_module, weights))))
