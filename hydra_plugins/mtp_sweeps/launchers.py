"""The launcher that conf/hydra/launcher/ configures, and its sweeper. Hydra imports this at every
start, so their own imports wait until they run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class SweepLauncher(Launcher):
    """Passes the jobs of a sweep to the module of ``sweeps/`` that runs them; None leaves them to
    workers, and ``dry_run`` only checks and lists them. ``settings`` are for its ``run``."""

    composes = True  # before the first job starts, so the sweeper need not
    config: DictConfig  # the sweep's own
    hydra_context: HydraContext  # composes the jobs' configs

    def __init__(self, module: str | None, dry_run: bool = False, **settings: Any) -> None:
        self.module, self.dry_run, self.settings = module, dry_run, settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Any:
        from sweeps.launch import launch

        return launch(
            self.module,
            self.settings,
            config=self.config,
            loader=self.hydra_context.config_loader,
            batch=job_overrides,
            dry_run=self.dry_run,
        )


class GridSweeper(BasicSweeper):
    """Hydra's own sweeper, except that it refuses keys without values, quotes paths, and leaves the
    sweep's folder and the jobs' configs to a launcher that composes all of them before one runs."""

    @staticmethod
    def split_arguments(overrides: Any, max_batch_size: int | None) -> Any:
        from sweeps.compose import prepare_values

        for override in overrides:
            prepare_values(override)
        return BasicSweeper.split_arguments(overrides, max_batch_size)

    def sweep(self, arguments: list[str]) -> Any:
        # An attribute, not isinstance: Hydra imports its plugins twice.
        if self.hydra_context is None or not getattr(self.launcher, "composes", False):
            return super().sweep(arguments)
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        return self.launcher.launch(self.split_arguments(overrides, None)[0], initial_job_idx=0)
