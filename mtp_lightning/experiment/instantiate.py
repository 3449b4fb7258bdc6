"""Objects by the ``_target_`` of a config. Whom to trust is decided by where the config is from.

What a user composed, on the command line or in a ``--config-dir`` of his own, may build any class
that can be imported (:func:`instantiate`). What was stored by somebody, in a checkpoint or a
downloaded folder, may build what this platform's own conf/ builds, and classes that are defined in
packages the user allows by name (:func:`rebuild`).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from functools import cache
from types import UnionType
from typing import Any, get_args

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.paths import CONF

_TARGET = re.compile(r"^\s*_target_:\s*([\w.]+)\s*$", re.MULTILINE)


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
    try:
        built = hydra.utils.instantiate(config, **arguments, _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, (ValueError, OSError)):
            raise cause from None
        if isinstance(cause, TypeError):
            _require_kinds(config)
            raise UserError(f"{target} refuses its settings: {cause}") from error
        if isinstance(cause, ImportError):
            raise UserError(_not_importable(str(target), cause)) from error
        raise
    if kind is not None and not isinstance(built, kind):
        raise UserError(
            f"_target_={target} gives a {type(built).__name__}, and {kind.__name__} is needed here."
        )
    _require_kinds(config)
    return built


def _require_kinds(node: Any) -> None:
    """Refuse values of another kind than a class of this platform says that it takes, such as words
    for a switch: what its own checks have let through is used wherever Python happens to take it.

    Args:
        node: of a config, with all that stands in it.

    Raises:
        UserError: a value that is not of the kind.
    """
    if isinstance(node, ListConfig):
        for entry in node:
            _require_kinds(entry)
    if not isinstance(node, DictConfig):
        return
    target = str(node.get("_target_", ""))
    wanted = _kinds(target) if target in own_targets() else {}
    for key, value in node.items():
        _require_kinds(value)
        kinds = wanted.get(str(key))
        if kinds is not None and not _is_of(value, kinds):
            name = node._get_full_key(str(key))
            words = " or ".join(_WORDS[kind] for kind in kinds)
            raise UserError(f"{name} must be {words}, not {value!r}.")


# The kinds that are checked; a parameter that takes any other, too, is left to its class.
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}
_NAMES = {"bool": bool, "int": int, "float": float, "None": type(None)}


@cache
def _kinds(target: str) -> dict[str, tuple[type, ...]]:
    """What the parameters of a target take, of those that take the kinds above alone."""
    kinds = {}
    for name, parameter in inspect.signature(hydra.utils.get_object(target)).parameters.items():
        hint = parameter.annotation
        if isinstance(hint, str):
            parts = [_NAMES.get(part) for part in hint.split(" | ")]
        else:
            parts = list(get_args(hint)) if isinstance(hint, UnionType) else [hint]
        parts += [type(None)] if parameter.default is None else []
        if set(parts) <= _WORDS.keys():
            kinds[name] = tuple(part for part in parts if part is not None)
    return kinds


def _is_of(value: Any, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, bool):
        return bool in kinds
    return isinstance(value, kinds) or (float in kinds and isinstance(value, int))


def rebuild(config: DictConfig, *, allow: Collection[str] = (), **arguments: Any) -> Any:
    """Build what a stored node names.

    Args:
        config: the node.
        allow: packages whose own classes may be built.
        arguments: beside the node's own keys.

    Raises:
        UserError: a target from elsewhere; else as :func:`instantiate`.
    """
    for target in targets(OmegaConf.to_container(config, resolve=True)):
        if target not in own_targets() and not _defined_in(target, allow):
            package = target.partition(".")[0]
            raise UserError(
                f"_target_={target} is refused: what was stored may only build what this "
                f"platform's own conf/ builds. If you trust its package, say allow=[{package}]."
            )
    return instantiate(config, **arguments)


def trusted_packages(cfg: DictConfig) -> list[str]:
    """Packages whose variants a checkpoint may ask for: those the user allows, and those that he
    composes classes of himself."""
    composed = set(targets(OmegaConf.to_container(cfg))) - own_targets()
    return sorted({*cfg.get("allow", []), *(target.partition(".")[0] for target in composed)})


@cache
def own_targets() -> frozenset[str]:
    """What the files of conf/ build. (A package's name is no guard:
    ``mtp_lightning.run.atomic.os.replace`` begins with it, too.)"""
    files = (file.read_text(encoding="utf-8") for file in CONF.rglob("*.yaml"))
    return frozenset(match for text in files for match in _TARGET.findall(text))


def targets(node: Any) -> list[str]:
    """Every ``_target_`` in plain containers."""
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for value in node.values() for target in targets(value)]
    if isinstance(node, list):
        return [target for value in node for target in targets(value)]
    return []


def _not_importable(target: str, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return (
        f"_target_={target} cannot be imported ({reason}): check the name, and that its folder is "
        "on PYTHONPATH."
    )


def _defined_in(target: str, allow: Collection[str]) -> bool:
    """Whether a target is a class of an allowed package, and not one that the package imported."""
    if target.partition(".")[0] not in allow:
        return False
    try:
        found = hydra.utils.get_object(target)
    except Exception as error:
        raise UserError(_not_importable(target, error)) from error
    module = getattr(found, "__module__", "")
    return isinstance(found, type) and module.partition(".")[0] in allow
