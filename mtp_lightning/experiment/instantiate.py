"""Objects by the ``_target_`` of a config. Whom to trust is decided by where the config is from.

What a user composed, on the command line or in a ``--config-dir`` of his own, may build any class
that can be imported (:func:`instantiate`). What was stored by somebody, in a checkpoint or a
downloaded folder, may build what this platform's own conf/ builds of the kind, and classes that are
defined in packages the user allows by name (:func:`rebuild`, ``mtp_lightning/stored.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from mtp_lightning import vetting
from mtp_lightning.errors import UserError
from mtp_lightning.stored import (
    DATA,
    not_importable,
    own_targets,
    require_network,
    require_target,
    targets,
)


def instantiate(config: DictConfig, *, kind: type | None = None, **arguments: Any) -> Any:
    """Build what a node that the user composed names.

    Args:
        config: the node.
        kind: what must come out; None is anything.
        arguments: beside the node's own keys.

    Raises:
        UserError: a target that cannot be imported or gives something else, an unknown key, or
            what the object's own checks refuse.
    """
    target = config.get("_target_")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    vetting.check_values(plain, config._get_full_key(""))
    try:
        built = hydra.utils.instantiate(config, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        if isinstance(cause, TypeError):
            raise UserError(f"{target} refuses its settings: {cause}") from error
        if isinstance(cause, ImportError):
            raise UserError(not_importable(str(target), cause)) from error
        raise
    if kind is not None and not isinstance(built, kind):
        raise UserError(
            f"_target_={target} gives a {type(built).__name__}, and {kind.__name__} is needed here."
        )
    return built


def rebuild(
    config: DictConfig,
    *,
    kind: type | None = None,
    allow: Collection[str] = (),
    groups: Sequence[str] = DATA,
    **arguments: Any,
) -> Any:
    """Build what a stored node names, by default data.

    Args:
        config: the node.
        kind: what must come out; None is anything.
        allow: packages whose own classes may be built, and names of what may reach the network
            (:data:`mtp_lightning.stored.NETWORK`).
        groups: of conf/, whose classes may be built.
        arguments: in the place of the node's own keys.

    Raises:
        UserError: a target from elsewhere; else as :func:`instantiate`.
    """
    node: Any = OmegaConf.to_container(config, resolve=True)
    for target in targets({key: node[key] for key in node if key not in arguments}):
        require_target(target, allow, groups=groups, how="allow=[{}]")
        require_network(target, allow, how="allow=[{}]")
    return instantiate(config, kind=kind, **arguments)


def trusted_packages(cfg: DictConfig) -> list[str]:
    """Packages whose variants a checkpoint may ask for: those the user allows, and those that he
    composes classes of himself."""
    composed = set(targets(OmegaConf.to_container(cfg))) - own_targets()
    return sorted({*cfg.get("allow", []), *(target.partition(".")[0] for target in composed)})
