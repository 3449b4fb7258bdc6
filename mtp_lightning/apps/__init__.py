"""The Hydra apps: each composes its config of the command line and calls one function with it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.cli import program, readable_errors
from mtp_lightning.literal import literal
from mtp_lightning.paths import CONF

# Help texts name the program as it was started: ${program:train}.
OmegaConf.register_new_resolver("program", program, replace=True)


def start(config_name: str, task: Callable[[DictConfig], Any]) -> None:
    """Run an app on this process's command line.

    Args:
        config_name: of its config in conf/.
        task: what it does; where it is defined, Hydra takes the app's name from.
    """
    sys.argv[1:] = literal(sys.argv[1:])
    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()


__all__ = ["readable_errors", "start"]
