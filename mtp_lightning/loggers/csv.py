"""The logger of every run: its ``metrics.csv``, which sweeps and reports read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from mtp_lightning.loggers.base import RunLogger
from mtp_lightning.run.layout import METRICS_FILE
from mtp_lightning.run.metrics import MetricsFile


class MetricsCSV(RunLogger):
    """Writes ``metrics.csv`` into the run folder; see :class:`MetricsFile`."""

    name = version = ""  # the file is in the run folder itself

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self._file = MetricsFile(Path(folder) / METRICS_FILE)

    def resume_from(self, step: int) -> None:
        self._file.resume_from(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the run folder holds the composed configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        self._file.write(metrics, int(step))
