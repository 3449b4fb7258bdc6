"""Composes an app's config without the app, and lists what its command line sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.command_line import check_config
from mtp_lightning.command_line.quote import literal
from mtp_lightning.command_line.shell import composing
from mtp_lightning.paths import CONF
from mtp_lightning.run.config import affects_training, is_plain, key_of, lies_in, values_by_key


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """Compose the config ``name`` of conf/ with overrides as they are typed on the command line;
    refuse those that do not fit it."""
    with (
        composing(overrides, name),
        initialize_config_dir(version_base="1.3", config_dir=str(CONF)),
    ):
        return compose(name, overrides=literal(list(overrides)))


def checked_config(overrides: Sequence[str], name: str = "config") -> DictConfig:
    """Compose the config of an app and check it as the app does; a mistake is a UserError."""
    cfg = compose_config(name, overrides)
    check_config.check(OmegaConf.to_container(cfg), name, overrides)  # type: ignore[arg-type]
    return cfg


def overridden(group: str) -> list[str]:
    """The overrides of a config group on the command line of the running app."""
    if not HydraConfig.initialized():
        return []
    overrides = [o.lstrip("+~") for o in HydraConfig.get().overrides.task]
    return [o for o in overrides if lies_in(key_of(o), [group])]


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """The hyperparameters that loggers show: depth, lambda, seed and all keys of the command line.

    A key that names a config group (``mtp=parallel``) has the group's choice as its value. A stack
    without depths is always shown as ``mtp=none``, since its other settings have no effect.
    """
    keys = ["mtp.depth", "mtp_lambda", "seed"]
    choices: dict[str, Any] = {}
    texts: dict[str, str] = {}
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        choices = dict(hydra_config.runtime.choices)
        task = hydra_config.overrides.task
        texts = values_by_key(o for o in task if not o.startswith("~"))
        keys += texts
    chosen: dict[str, Any] = {}
    for key in keys:
        if not affects_training(key):
            continue
        value = choices.get(key) or OmegaConf.select(cfg, key)
        if OmegaConf.is_dict(value):  # a group from which several options are chosen
            value = texts.get(key, "")
        chosen[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if is_plain(chosen["mtp.depth"], OmegaConf.select(cfg, "mtp._target_")):
        chosen = {k: v for k, v in chosen.items() if k.partition(".")[0] != "mtp"}
        chosen |= {"mtp.depth": 0, "mtp": "none"}
    return chosen
