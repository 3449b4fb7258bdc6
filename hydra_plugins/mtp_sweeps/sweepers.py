"""The sweeper that conf/hydra/sweeper/ configures. Hydra imports this at every start."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """``hydra/sweeper=grid``: Hydra's own, but that it leaves the first look at the jobs' configs
    to a launcher that takes it: each would be composed twice."""

    def validate_batch_is_legal(self, batch: list[list[str]]) -> None:
        # Not by its class: Hydra imports its plugins twice.
        if not getattr(self.launcher, "composes", False):
            super().validate_batch_is_legal(batch)
