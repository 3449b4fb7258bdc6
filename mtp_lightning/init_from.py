"""Starts a new run from the weights and tokenizer of a trained model, without its progress.

The model is anything that :func:`~mtp_lightning.opening.read_model` reads: another run, whose trunk
must have the same config, or an imported model, which brings the trunk's config too. The MTP stack
may differ. Modules that the trained model lacks start with new weights, and modules that the new
model lacks are dropped; a log message lists both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from data_modules.windows import WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.starting import read_text
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.opening import Stored, StoredModel, load_weights
from mtp_lightning.run.config import describe_differences


@dataclass(frozen=True, kw_only=True)
class Inherited:
    """The origin of the weights of the stack's modules.

    Attributes:
        kept: modules that start from the trained weights.
        new: modules that start with new weights.
        dropped: modules of the trained model that this model does not have.
    """

    kept: list[str]
    new: list[str]
    dropped: list[str]

    def __str__(self) -> str:
        named = (("kept", self.kept), ("new", self.new), ("dropped", self.dropped))
        found = [f"{what}: {', '.join(modules)}" for what, modules in named if modules]
        return "; ".join(["trunk and head kept", *found])


def start_from(
    model: MTPModel, start: StoredModel, windows: WindowBatch | None = None
) -> Inherited:
    """Load the weights of ``start`` into a freshly initialized model.

    Args:
        model: the model. Its modules that ``start`` lacks are initialized by ``mtp.init``.
        start: the trained model.
        windows: training text for ``mtp.init=last_block``; None for ``random``.

    Raises:
        UserError: the trunks differ, the stack's weights mean something else under this config, or
            names or shapes do not fit.
    """
    old, wanted = start.config, model.config
    model.mtp.check_beginning(model.trunk)
    _check_trunk(start.path, old, wanted)
    same_stack = old.mtp.variant == wanted.mtp.variant
    if same_stack:
        _check_meaning(start.path, old, wanted)
    stored: dict[str, torch.Tensor | Stored] = {
        name: t for name, t in start.weights.items() if not name.startswith("mtp.")
    }
    own = model.state_dict()
    old_modules = _modules(start.weights)
    own_modules = _modules(own)
    kept = [name for name in own_modules if same_stack and name in old_modules]
    new = [name for name in own_modules if name not in kept]
    if wanted.mtp.init != "random" and not new:
        raise UserError(
            f"mtp.init={wanted.mtp.init} has no effect: init_from={start.path} holds every module "
            "of this run; set mtp.init=random."
        )
    for name, tensor in start.weights.items():
        if _module(name) in kept:
            stored[name] = tensor
    for name, tensor in own.items():
        if _module(name) in new:
            stored[name] = tensor
    load_weights(model, stored, source=str(start.path))
    text = None
    if wanted.mtp.init != "random":
        assert windows is not None
        text = read_text(model.trunk, model.mtp, windows)
    fresh = [int(name.rpartition(".")[2]) for name in new if name.startswith("mtp.depths.")]
    model.mtp.begin(fresh, model.trunk, model.head, text)
    return Inherited(kept=kept, new=new, dropped=[m for m in old_modules if m not in kept])


def free_keys(trunk: TrunkConfig) -> list[str]:
    """The dotted keys of a trunk in which a run may differ from the model that it starts from."""
    return ["init_std", *trunk.training_keys]


def _check_trunk(path: Path, old: ModelConfig, wanted: ModelConfig) -> None:
    before, now = old.to_dict()["trunk"], wanted.to_dict()["trunk"]
    differences = describe_differences(before, now, ignore=free_keys(wanted.trunk))
    if differences:
        raise UserError(
            f"init_from={path} has another trunk than this run ({'; '.join(differences)}): "
            "choose the model and tokenizer settings that it was trained with."
        )


def _check_meaning(path: Path, old: ModelConfig, wanted: ModelConfig) -> None:
    for name in wanted.mtp.meaning:
        before, now = getattr(old.mtp, name), getattr(wanted.mtp, name)
        if before != now and old.mtp.depth and wanted.mtp.depth:
            raise UserError(
                f"init_from={path} was trained with mtp.{name}={before}, and its modules mean "
                f"something else under mtp.{name}={now}: set mtp.{name}={before}."
            )


def _module(name: str) -> str | None:
    """``mtp.depths.1.block.out.weight`` -> ``mtp.depths.1``; None outside the stack."""
    return ".".join(name.split(".")[:3]) if name.startswith("mtp.") else None


def _modules(weights: Iterable[str]) -> list[str]:
    found = [_module(name) for name in weights]
    return list(dict.fromkeys(name for name in found if name is not None))
