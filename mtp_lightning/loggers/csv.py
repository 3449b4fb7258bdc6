"""The logger that every run has: its ``metrics.csv``, which sweeps and reports read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.errors import UserError
from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.run.layout import METRICS_FILE
from mtp_lightning.run.metrics import MetricsFile


class MetricsCSV(RunLogger):
    """Writes ``folder/metrics.csv``: see :class:`mtp_lightning.run.metrics.MetricsFile`.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._file = MetricsFile(Path(folder) / METRICS_FILE)

    @property
    def name(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies in the run folder itself."""
        return ""

    def resume_from(self, step: int) -> None:
        """Drop the rows after ``step``."""
        self._file.resume_from(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds the composed configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add values to the row of ``step``.

        Raises:
            UserError: when there is no step.
        """
        if step is None:
            raise UserError("metrics.csv needs the step that values belong to, but it is None.")
        self._file.write(metrics, int(step))
