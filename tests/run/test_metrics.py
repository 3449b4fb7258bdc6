"""`metrics.csv` keeps every bit, survives kills, and drops rows that a resumed run repeats."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_lightning.run.metrics import MetricsFile, read_metrics, read_newest

HEAD = "step,train/loss,val/loss_depth_0"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def table(path: Path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


def steps(path: Path) -> list[float]:
    return [row["step"] for row in read_metrics(path)]


def test_train_and_validation_share_the_row_of_their_step(path: Path) -> None:
    file = MetricsFile(path)
    assert not path.exists(), "nothing is written before the first value"
    file.write({"train/loss": 2.5}, 0)
    file.write({"train/loss": 2.0}, 1)
    file.write({"val/loss_depth_0": 3.0}, 1)
    file.write({"train/loss": 1.0}, 2)
    assert table(path) == [
        ["step", "train/loss", "val/loss_depth_0"],
        ["0", "2.5", ""],
        ["1", "2.0", "3.0"],
        ["2", "1.0", ""],
    ]
    assert sorted(p.name for p in path.parent.iterdir()) == ["metrics.csv"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=5))
def test_floats_round_trip_to_the_last_bit(path: Path, values: list[float]) -> None:
    path.unlink(missing_ok=True)
    file = MetricsFile(path)
    for step, value in enumerate(values):
        file.write({"x": value}, step)
    values_read = [row["x"] for row in read_metrics(path)]
    assert [v.hex() for v in values_read] == [v.hex() for v in values]


def test_nan_tensors_ints_and_quoted_tags_round_trip(path: Path) -> None:
    values = {"a": float("nan"), "b": torch.tensor(0.1), "c": 3, 'odd,"tag"': 1.0, "on": True}
    MetricsFile(path).write(values, 4)
    (row,) = read_metrics(path)
    assert math.isnan(row["a"])
    assert row["b"] == torch.tensor(0.1).item()
    assert (row["c"], row["step"], row['odd,"tag"'], row["on"]) == (3, 4, 1.0, 1)


@pytest.mark.parametrize("step", [4, 5])
def test_resume_joins_the_row_of_the_resumed_step_and_drops_later_ones(path, step) -> None:
    first = MetricsFile(path)
    for done in range(6):
        first.write({"a": done / 7, "b": done}, done)
    second = MetricsFile(path)
    second.resume_from(3)
    second.write({"a": 2.0, "c": 5.0}, 3)  # a shorter row
    second.write({"a": 40.0}, step)
    earlier = [{"step": done, "a": done / 7, "b": done} for done in range(3)]
    joined = {"step": 3, "a": 2, "b": 3, "c": 5}
    assert read_metrics(path) == [*earlier, joined, {"step": step, "a": 40}]
    assert len(table(path)) == 6, "nothing is left of the longer row"


def test_a_torn_last_line_is_dropped(path: Path) -> None:
    first = MetricsFile(path)
    for step in range(3):
        first.write({"a": 0.1, "b": 0.25}, step)
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    assert steps(path) == [0, 1]
    MetricsFile(path).write({"a": 0.1, "b": 0.25}, 2)
    assert path.read_bytes() == whole


def test_a_missing_file_has_no_newest_row(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="metrics.csv"):
        read_metrics(path)
    assert read_newest(path, "a") is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"not,a,metrics\n1,2,3\n",
        b"step,a\n1,x\n",
        b"step,a\n1,2,3\n",
        b"step,a\n\xff,2\n",
    ],
)
def test_a_damaged_file_has_no_rows(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert read_metrics(path) == [] and read_newest(path, "a") is None


def test_the_newest_row_skips_empty_cells_and_unfinished_rows(path: Path) -> None:
    # The third row has no training loss, and the last one is still being written.
    path.write_text("\n".join([HEAD, "10,5.5,", "20,4.5,4.25", "30,,4.0", "40,9."]))
    assert read_newest(path, "train/loss") == (20, 4.5)
    losses = {row["step"]: row.get("val/loss_depth_0") for row in read_metrics(path)}
    assert losses == {10: None, 20: 4.25, 30: 4.0}
    assert read_newest(path, "nothing") is None


@pytest.mark.parametrize("n", [3, 5000])
@pytest.mark.parametrize("width", [1, 7, 2000])
def test_the_newest_row_is_found_at_any_length_of_the_rows_and_of_the_file(path, n, width) -> None:
    """The first validation is far from the end of a long file."""
    n = n // width + 3
    head = [HEAD, *(f"tag_{i}" for i in range(width))]
    rows = [[f"{i},{i / 8},{i / 4 if i == 2 else ''}", *["0.125"] * width] for i in range(1, n)]
    path.write_text("\n".join([*map(",".join, [head, *rows]), ""]))
    assert read_newest(path, "train/loss") == (n - 1, (n - 1) / 8)
    assert read_newest(path, "val/loss_depth_0") == (2, 0.5)
    assert read_newest(path, "val/loss") is None
