"""An app's config without the app: for a notebook and for benchmarks."""

from __future__ import annotations

from collections.abc import Sequence

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig

from mtp_lightning.errors import UserError
from mtp_lightning.literal import literal
from mtp_lightning.misspelt import sentence
from mtp_lightning.paths import CONF


def compose_config(name: str, overrides: Sequence[str]) -> DictConfig:
    """The config ``name`` of conf/ with overrides as one types them on the command line.

    Raises:
        UserError: they do not fit the config.
    """
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            return compose(name, overrides=literal(list(overrides)))
    except HydraException as error:
        raise UserError(sentence(error)) from error
