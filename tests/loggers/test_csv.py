"""The logger of `metrics.csv`; the file itself is tested in tests/run/test_metrics.py."""

from __future__ import annotations

from pathlib import Path

from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.run.metrics import read_metrics


def test_rows_are_written_to_the_run_folder(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "run")
    logger.log_hyperparams({"a": 1})
    assert not (tmp_path / "run").exists(), "nothing is written before the first value"
    for step in (1, 2, 3):
        logger.log_metrics({"a": step / 8}, step)
    resumed = MetricsCSV(tmp_path / "run")
    resumed.resume_from(1)
    resumed.log_metrics({"a": 0.5}, 2)
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert rows == [{"step": 1, "a": 0.125}, {"step": 2, "a": 0.5}]
