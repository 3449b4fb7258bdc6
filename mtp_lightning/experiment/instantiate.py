"""Objects by the ``_target_`` of a config, and only such as this project's own conf/ builds."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.paths import CONF

_TARGET = re.compile(r"^\s*_target_:\s*([\w.]+)\s*$", re.MULTILINE)


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
