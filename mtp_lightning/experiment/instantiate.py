"""Builds the object that a config's ``_target_`` names. The config's origin decides what it may be.

A config that the user composes, on the command line or in a ``--config-dir``, may build any class
that can be imported (:func:`instantiate`). A stored config, from a checkpoint or a downloaded
folder, may build only the classes that this project's conf/ uses for the same purpose, and classes
of packages that the user allows by name (:func:`rebuild`, ``mtp_lightning/stored.py``).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.keys import OWN, require_allowed
from mtp_lightning.errors import UserError
from mtp_lightning.stored import DATA, not_importable, own_targets, require_target, targets


def instantiate(config: DictConfig, *, kind: type | None = None, **arguments: Any) -> Any:
    """Build the object of a node that the user composed. It must be of the class ``kind``, if one
    is given; ``arguments`` are passed in addition to the node's own keys.

    Raises:
        UserError: the target cannot be imported or has another class, a key is unknown, or the
            object's own checks refuse a value.
    """
    target = config.get("_target_")
    plain: Any = OmegaConf.to_container(config, resolve=True)
    path = config._get_full_key("")
    if target is None:
        raise UserError(f"{path} names no class: set {path}._target_ in its YAML file.")
    check_config.check_values(plain, path)
    try:
        built = hydra.utils.instantiate(config, **arguments, _convert_="all")
    except (InstantiationException, TypeError) as error:
        cause = error.__cause__
        if cause is None:  # Hydra refuses the node itself
            reason, _, key = str(error).partition("\nfull_key: ")
            raise UserError(f"{key or target} cannot be built: {reason}.") from error
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        # Lightning's error of a wrong setting, by name, since generating imports no lightning.
        if isinstance(cause, TypeError) or type(cause).__name__ == "MisconfigurationException":
            raise UserError(f"{path}: {target} refuses its settings: {cause}") from error
        if isinstance(cause, ImportError):
            raise UserError(not_importable(str(target), cause)) from error
        raise
    if kind is not None and not isinstance(built, kind):
        raise UserError(
            f"_target_={target} gives a {type(built).__name__}, and {kind.__name__} is needed here."
        )
    require_annotated(type(built), plain, path)
    return built


def require_annotated(kind: type, settings: Mapping[str, Any], path: str) -> None:
    """Refuse values that the annotations of a class exclude, such as ``shift: int``. Values of this
    project's classes were checked by the comments of conf/."""
    if kind.__module__.startswith((*OWN, "builtins")):
        return
    for name, parameter in inspect.signature(kind).parameters.items():
        annotation = inspect.formatannotation(parameter.annotation).strip("'")
        plain = re.fullmatch(r"(?:Optional\[)?(int|float|bool|str)( \| None|\])?", annotation)
        if plain and name in settings and settings[name] is not parameter.default:
            rule = f"{plain[1]}, or null" if plain[2] else plain[1]
            require_allowed(f"{path}.{name}", settings[name], rule)


def rebuild(
    config: DictConfig,
    *,
    kind: type | None = None,
    allow: Collection[str] = (),
    groups: Sequence[str] = DATA,
    **arguments: Any,
) -> Any:
    """Build the object of a stored node, by default data.

    Args:
        allow: packages whose own classes may be built, and names of classes that may use the
            network (:data:`mtp_lightning.stored.NETWORK`).
        groups: the groups of conf/ whose classes may be built.
        arguments: keyword arguments, which replace the node's own keys.
        kind: as for :func:`instantiate`.

    Raises:
        UserError: the target is not allowed; else as :func:`instantiate`.
    """
    node: Any = OmegaConf.to_container(config, resolve=True)
    for target in targets({key: node[key] for key in node if key not in arguments}):
        require_target(target, allow, groups=groups, how="'allow=[{}]'")
    return instantiate(config, kind=kind, **arguments)


def trusted_packages(cfg: DictConfig) -> list[str]:
    """The packages whose classes a checkpoint may use: those the user allows, and those whose
    classes the user's own config names."""
    composed = set(targets(OmegaConf.to_container(cfg))) - own_targets()
    return sorted({*cfg.get("allow", []), *(target.partition(".")[0] for target in composed)})
