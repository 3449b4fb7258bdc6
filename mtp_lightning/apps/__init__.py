"""The Hydra apps: each composes its config of the command line and calls one function with it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import hydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from mtp_lightning.apps.around_hydra import hydra_as_ours, require_flags
from mtp_lightning.cli import QUIET, program, readable_errors
from mtp_lightning.literal import literal, require_utf8
from mtp_lightning.paths import CONF

_QUIET = "--quiet"

# Help texts name the program as it was started: ${program:train}.
OmegaConf.register_new_resolver("program", program, replace=True)


def start(
    config_name: str, task: Callable[[DictConfig], Any], *, ends_with_reader: bool = False
) -> None:
    """Run an app on this process's command line.

    ``--help GROUP`` explains a group of conf/ and ``--help GROUP=NAME`` the keys of an option;
    ``--quiet`` shows no progress and gives way to whatever else the machine has to do.

    Args:
        config_name: of its config in conf/.
        task: what it does; where it is defined, Hydra takes the app's name from.
        ends_with_reader: see :func:`~mtp_lightning.cli.readable_errors`.
    """
    # A log that cannot be written, as on a full disk, is no news beside what it was to say.
    logging.raiseExceptions = False
    errors = readable_errors(ends_with_reader=ends_with_reader)
    with errors, hydra_as_ours(sys.argv[1:]):
        _explain(sys.argv[1:])
        if _QUIET in sys.argv:
            sys.argv.remove(_QUIET)
            # Inherited by all processes of a run, and by the jobs of a sweep.
            os.environ[QUIET] = "1"
            os.nice(19)
        require_utf8(sys.argv[1:])
        sys.argv[1:] = literal(sys.argv[1:])
        require_flags(sys.argv[1:])
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(task)()


class Check(Callback):
    """Looks through the composed config before Hydra makes a folder and torch is imported."""

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        """Before the task of an app."""
        with readable_errors():
            from mtp_lightning import places, vetting

            app = str(config.hydra.job.config_name)
            plain = OmegaConf.to_container(config)
            assert isinstance(plain, dict)
            vetting.check(plain, app, list(config.hydra.overrides.task))  # type: ignore[arg-type]
            places.check(plain, app, str(config.hydra.run.dir))  # type: ignore[arg-type]


def _explain(arguments: list[str]) -> None:
    """What ``--help`` with a word behind it asks for."""
    if len(arguments) == 2 and arguments[0] in ("--help", "-h", "help"):
        from mtp_lightning.explained import help_for

        print(help_for(arguments[1]))
        sys.exit(0)


__all__ = ["Check", "readable_errors", "start"]
