"""`metrics.csv` keeps every bit, survives kills, and forgets what a resumed run does again."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_lightning.loggers.csv import MetricsCSV, read_metrics


def table(folder: Path) -> list[list[str]]:
    return list(csv.reader((folder / "metrics.csv").read_text().splitlines()))


def test_train_and_validation_share_the_row_of_their_step(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 2.5}, 0)
    logger.log_metrics({"train/loss": 2.0}, 1)
    logger.log_metrics({"val/loss_depth_0": 3.0}, 1)
    logger.log_metrics({"train/loss": 1.0}, 2)
    assert table(tmp_path) == [
        ["step", "train/loss", "val/loss_depth_0"],
        ["0", "2.5", ""],
        ["1", "2.0", "3.0"],
        ["2", "1.0", ""],
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.csv"]


def test_every_row_is_on_disk_at_once(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(3):
        logger.log_metrics({"a": float(step)}, step)
        assert [row["a"] for row in read_metrics(tmp_path / "metrics.csv")] == list(range(step + 1))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_floats_round_trip_to_the_last_bit(tmp_path: Path, values: list[float]) -> None:
    (tmp_path / "metrics.csv").unlink(missing_ok=True)
    logger = MetricsCSV(tmp_path)
    for step, value in enumerate(values):
        logger.log_metrics({"x": value}, step)
    got = [row["x"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert [v.hex() for v in got] == [v.hex() for v in values]


def test_nan_tensors_and_ints(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": float("nan"), "b": torch.tensor(0.1), "c": 3, 'odd,"tag"': 1.0}, 4)
    (row,) = read_metrics(tmp_path / "metrics.csv")
    assert math.isnan(row["a"])
    assert row["b"] == torch.tensor(0.1).item()
    assert (row["c"], row["step"], row['odd,"tag"']) == (3, 4, 1.0)
    with pytest.raises(ValueError, match="step"):
        logger.log_metrics({"a": 1.0})


def test_resume_drops_the_rows_that_are_done_again(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(6):
        first.log_metrics({"a": float(step)}, step)
    second = MetricsCSV(tmp_path, resume_from_step=3)
    second.log_metrics({"a": 40.0}, 4)
    assert [(r["step"], r["a"]) for r in read_metrics(tmp_path / "metrics.csv")] == [
        (0, 0), (1, 1), (2, 2), (3, 3), (4, 40),
    ]  # fmt: skip


def test_resume_keeps_nothing_beyond_the_step(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(6):
        first.log_metrics({"a": float(step)}, step)
    MetricsCSV(tmp_path, resume_from_step=3).log_metrics({"a": 50.0}, 5)
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [0, 1, 2, 3, 5]


def test_resume_joins_the_row_of_the_resumed_step(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    first.log_metrics({"a": 1.0}, 0)
    first.log_metrics({"a": 123456789.0}, 1)
    second = MetricsCSV(tmp_path)
    second.resume_from(1)
    second.log_metrics({"a": 2.0, "b": 5.0}, 1)
    second.log_metrics({"a": 3.0}, 2)
    assert table(tmp_path) == [
        ["step", "a", "b"],
        ["0", "1.0", ""],
        ["1", "2.0", "5.0"],
        ["2", "3.0", ""],
    ]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(3):
        first.log_metrics({"a": 0.1, "b": 0.25}, step)
    whole = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(whole[:-3])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == [0, 1]
    MetricsCSV(tmp_path).log_metrics({"a": 0.1, "b": 0.25}, 2)
    assert (tmp_path / "metrics.csv").read_bytes() == whole


def test_nothing_is_written_before_the_first_value(tmp_path: Path) -> None:
    MetricsCSV(tmp_path / "run").log_hyperparams({"a": 1})
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError, match="metrics.csv"):
        read_metrics(tmp_path / "run" / "metrics.csv")
