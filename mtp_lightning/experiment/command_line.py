"""What an app's command line says."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.run.config import has_bearing, is_plain, key_of, lies_in


def overridden(group: str) -> list[str]:
    """The overrides of a config group that were given on the command line of an app."""
    if not HydraConfig.initialized():
        return []
    given = [o.lstrip("+~") for o in HydraConfig.get().overrides.task]
    return [o for o in given if lies_in(key_of(o), [group])]


def hyperparameters(cfg: DictConfig) -> dict[str, Any]:
    """What tells this run from its neighbours: a few keys, and all that the command line names.

    A key that names a group of the config (``mtp=parallel``) has the group's choice as its value.
    Without depths, ``mtp=none`` is all that can be said of the stack, however it was asked for.
    """
    keys = ["mtp.depth", "mtp_lambda", "seed"]
    choices: dict[str, Any] = {}
    texts: dict[str, str] = {}
    if HydraConfig.initialized():
        hydra_config = HydraConfig.get()
        choices = dict(hydra_config.runtime.choices)
        given = [o for o in hydra_config.overrides.task if not o.startswith("~")]
        texts = {key_of(o): o.partition("=")[2] for o in given}
        keys += texts
    chosen: dict[str, Any] = {}
    for key in keys:
        if not has_bearing(key):
            continue
        value = choices.get(key) or OmegaConf.select(cfg, key)
        if OmegaConf.is_dict(value):  # several choices of one group
            value = texts.get(key, "")
        chosen[key] = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if is_plain(chosen["mtp.depth"], OmegaConf.select(cfg, "mtp._target_")):
        chosen = {k: v for k, v in chosen.items() if k.partition(".")[0] != "mtp"}
        chosen |= {"mtp.depth": 0, "mtp": "none"}
    return chosen
