"""The sweeper that conf/hydra/sweeper/ configures. Hydra imports this at every start."""

from __future__ import annotations

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper


class GridSweeper(BasicSweeper):
    """``hydra/sweeper=grid``: Hydra's own, except that a launcher that composes the jobs' configs
    replaces its check: otherwise each config would be composed twice."""

    def validate_batch_is_legal(self, batch: list[list[str]]) -> None:
        # An attribute, not isinstance: Hydra imports its plugins twice.
        if not getattr(self.launcher, "composes", False):
            super().validate_batch_is_legal(batch)
