"""The launchers that conf/hydra/launcher/ configures. Hydra imports this at every start, so their
own imports wait until they run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class _SweepLauncher(Launcher):
    """Holds the settings for the module of ``sweeps/`` that runs the jobs.

    Attributes:
        module: that module; None for a launcher that leaves the jobs to workers.
        composes: whether it composes all jobs' configs before the first one starts, so that the
            sweeper need not.
    """

    module: str | None
    composes = True

    def __init__(self, dry_run: bool = False, **settings: Any) -> None:
        self.settings, self.dry_run = settings, dry_run
        self.config: DictConfig | None = None
        self.hydra_context: HydraContext | None = None

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from importlib import import_module

        from sweeps.launch import launch

        assert self.config is not None and self.hydra_context is not None
        run = self.module and partial(import_module(self.module).run, **self.settings)
        return launch(
            run or None,
            config=self.config,
            hydra_context=self.hydra_context,
            batch=job_overrides,
            dry_run=self.dry_run,
        )


class LocalPoolLauncher(_SweepLauncher):
    """``hydra/launcher=local_pool``"""

    module = "sweeps.pool"


class PlanLauncher(_SweepLauncher):
    """``hydra/launcher=plan``"""

    module = None


class SlurmLauncher(_SweepLauncher):
    """``hydra/launcher=slurm``"""

    module = "sweeps.slurm_cluster"


class RayLauncher(_SweepLauncher):
    """``hydra/launcher=ray``"""

    module = "sweeps.ray_cluster"
