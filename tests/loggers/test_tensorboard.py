"""TensorBoard's own reader finds the values, the purge and the charts that group the depths."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorBoard's imports
    from tensorboard.plugins.custom_scalar import layout_pb2, metadata

    from mtp_lightning.loggers.tensorboard import RunTensorBoard

from tests.integration.helpers import events


def charts_of_a_run(folder: Path, depth: int) -> dict[str, list[str]]:
    logger = RunTensorBoard(folder, depth=depth)
    for step in range(2):
        logger.log_metrics({"train/loss": 1.0}, step)
    logger.finalize("success")
    (event,) = events(folder).Tensors(metadata.CONFIG_SUMMARY_TAG)
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {
        chart.title: list(chart.multiline.tag)
        or [tag for one in chart.margin.series for tag in (one.value, one.lower, one.upper)]
        for chart in layout.category[0].chart
    }


def test_charts_group_the_depths(tmp_path: Path) -> None:
    charts = charts_of_a_run(tmp_path, depth=2)
    for title, tag in (("train loss", "train/loss"), ("lambda", "train/lambda")):
        (pattern,) = charts[title]
        assert all(re.match(pattern, f"{tag}_depth_{k}") for k in (0, 1, 2, 10))
        assert not re.match(pattern, tag) and not re.match(pattern, f"{tag}_depth_1_scaled")
    for title, tag in (
        ("tokens per pass", "decode/tokens_per_step"),
        ("acceptance at position 2", "decode/acceptance_position_2"),
    ):
        assert charts[title] == [tag, f"{tag}_low", f"{tag}_high"]
    assert "acceptance at position 3" not in charts


def test_no_lambda_chart_without_depths(tmp_path: Path) -> None:
    titles = {"train loss", "validation loss", "validation accuracy"}
    assert charts_of_a_run(tmp_path, depth=0).keys() == titles


def test_a_resumed_run_purges_the_steps_that_it_repeats(tmp_path: Path) -> None:
    first = RunTensorBoard(tmp_path, depth=1)
    for step in range(6):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finalize("failed")
    second = RunTensorBoard(tmp_path, depth=1)
    second.resume_from(3)
    second.log_metrics({"train/loss": 40.0}, 4)
    second.save()
    assert all(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())
    second.finalize("success")
    points = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert points == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 40)]
