"""What is looked at in a job's config before any job starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from mtp_lightning.paths import CONF


def compose_run(overrides: Sequence[str]) -> DictConfig:
    """The config that train.py composes from overrides; its folder is not settled yet.

    Raises:
        ValueError: they do not fit the config.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=list(overrides))
    except HydraException as error:
        raise ValueError(f"{' '.join(overrides)} does not compose: {error}") from error


def settle(composed: DictConfig, folder: Path) -> None:
    """Give a job's config its folder, and find out whether every value is there.

    Args:
        composed: without Hydra's own settings; resolved in place.
        folder: of the run.

    Raises:
        ValueError: it is another program's config, or a value is missing.
    """
    if "run_dir" not in composed or "trainer" not in composed:
        raise ValueError("Sweeps of this kind are for train.py: use hydra/launcher=basic here.")
    with open_dict(composed):
        composed.run_dir = composed.paths.output_dir = str(folder)
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ValueError(f"{missing[0]} has no value: give it as {missing[0]}=...")
    OmegaConf.resolve(composed)


def count_processes(composed: DictConfig) -> int:
    """How many processes train together in a job.

    Raises:
        ValueError: they cannot be counted, or need more than one machine.
    """
    trainer = composed.trainer
    if trainer.num_nodes != 1:
        raise ValueError(
            f"trainer.num_nodes={trainer.num_nodes} in a sweep: every job runs on one machine; "
            "start runs on several machines one by one."
        )
    devices = trainer.devices
    if isinstance(devices, bool) or not str(devices).isdigit() or int(devices) < 1:
        raise ValueError(
            f"trainer.devices={devices} in a sweep: give a number, so that jobs can share them."
        )
    if int(devices) > 1 and trainer.strategy == "auto":
        raise ValueError(f"trainer.devices={devices} needs trainer.strategy=ddp.")
    return int(devices)
