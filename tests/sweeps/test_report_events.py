"""A sweep's folder as TensorBoard's own code reads it: runs, HPARAMS, figures, texts, charts."""

from __future__ import annotations

import math
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TensorBoard's imports
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams import api_pb2
    from tensorboard.plugins.hparams.backend_context import Context
    from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
    from tensorboard.plugins.hparams.list_session_groups import Handler as ListGroups

    from mtp_lightning.loggers.tensorboard import RunTensorBoard

from sweeps.report.__main__ import report
from tests.sweeps.conftest import svg_once
from tests.sweeps.fixture_runs import task_run, write_run


class Board:
    """The answers of TensorBoard's server for a log folder."""

    def __init__(self, folder: Path) -> None:
        self.multiplexer = EventMultiplexer()
        self.multiplexer.AddRunsFromDirectory(str(folder))
        self.multiplexer.Reload()
        provider = MultiplexerDataProvider(self.multiplexer, str(folder))
        self.context = Context(TBContext(data_provider=provider, multiplexer=self.multiplexer))

    @property
    def runs(self) -> set[str]:
        return set(self.multiplexer.Runs())

    def columns(self) -> tuple[list[str], list[str]]:
        """Keys and metrics of the HPARAMS tab."""
        request = api_pb2.GetExperimentRequest(experiment_name="", include_metrics=True)
        experiment = GetExperiment(RequestContext(), self.context, "", request).run()
        keys = [info.name for info in experiment.hparam_infos]
        return keys, [info.name.tag for info in experiment.metric_infos]

    def rows(self) -> dict[str, tuple[dict[str, Any], dict[str, float], int]]:
        """(keys, metrics, status) of every run in the HPARAMS tab."""
        all_columns = [api_pb2.ColParams(hparam=name) for name in self.columns()[0]]
        status = list(api_pb2.Status.values())
        request = api_pb2.ListSessionGroupsRequest(
            allowed_statuses=status, col_params=all_columns, slice_size=100, include_metrics=True
        )
        groups = ListGroups(RequestContext(), self.context, "", request).run().session_groups
        rows = {}
        for group in groups:
            keys = {n: getattr(v, v.WhichOneof("kind")) for n, v in group.hparams.items()}
            metrics = {v.name.tag: v.value for v in group.metric_values}
            rows[group.sessions[0].name] = (keys, metrics, group.sessions[0].status)
        return rows


def log_run(folder: Path, depth: int, *, seed: int = 0, done: bool = True) -> None:
    """Write the events of a short training run."""
    logger = RunTensorBoard(folder, depth)
    params = {"mtp.depth": depth, "seed": seed, "mtp": "sequential", "mtp_lambda": [0.3, 0.1]}
    logger.log_hyperparams(params)
    final = {"val/loss_depth_0": 2.0 - depth, "val/bits_per_byte": math.nan}
    logger.log_metrics({"val/loss_depth_0": 3.0, "train/loss": 4.0}, 10)
    logger.log_metrics({"val/loss_depth_0": 2.0 - depth, "progress/seconds": 1.5}, 20)
    if done:
        logger.log_final(params, final, 20)
    logger.finalize("success")


def test_hparams_have_a_column_per_key_and_metric_of_any_run(tmp_path: Path) -> None:
    log_run(tmp_path / "depth-0", 0)
    log_run(tmp_path / "depth-2", 2, done=False)
    other_run = RunTensorBoard(tmp_path / "lr", 1)
    other_run.log_hyperparams({"optimizer.lr": 0.1})
    other_run.log_final({"optimizer.lr": 0.1}, {"val/accuracy_depth_0": 0.5}, 20)
    other_run.finalize("success")
    board = Board(tmp_path)
    assert board.runs == {"depth-0", "depth-2", "lr"}
    keys, metrics = board.columns()
    assert set(keys) == {"mtp.depth", "seed", "mtp", "mtp_lambda", "optimizer.lr"}
    assert {"val/loss_depth_0", "val/accuracy_depth_0"} <= set(metrics)
    assert "hp_metric" not in metrics
    rows = board.rows()
    keys_0, metrics_0, status_0 = rows["depth-0"]
    assert keys_0 == {"mtp.depth": 0, "seed": 0, "mtp": "sequential", "mtp_lambda": "[0.3, 0.1]"}
    assert metrics_0["val/loss_depth_0"] == 2.0 and math.isnan(metrics_0["val/bits_per_byte"])
    assert -1 not in metrics_0.values()
    assert status_0 == api_pb2.STATUS_SUCCESS
    assert rows["depth-2"][2] != api_pb2.STATUS_SUCCESS  # it has not finished
    assert rows["lr"][1]["val/accuracy_depth_0"] == 0.5


def test_final_metrics_are_not_drawn_twice(tmp_path: Path) -> None:
    log_run(tmp_path, 0)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    points = [(e.step, e.value) for e in reader.Scalars("val/loss_depth_0")]
    assert points == [(10, 3.0), (20, 2.0)]
    assert [e.step for e in reader.Scalars("val/bits_per_byte")] == [20]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two settings with events, and the report of them."""
    folder = tmp_path_factory.mktemp("sweep")
    for depth, seed in product((0, 1), (0, 1)):
        name, config = f"mtp.depth-{depth}_seed-{seed}", {"mtp.depth": depth, "seed": seed}
        run = write_run(folder / name, config, loss=2.0 - depth + 0.1 * seed)
        log_run(run, depth, seed=seed)
    with svg_once():
        report([folder])
        report([folder])  # must not duplicate anything
    return folder


def test_hparams_of_a_reported_sweep_are_varied_keys_and_metrics(sweep: Path) -> None:
    board = Board(sweep)
    keys, metrics = board.columns()
    assert keys == ["mtp.depth", "seed"]
    assert metrics[0] == "val/loss_depth_0" and "progress/seconds" in metrics
    assert "train/loss" not in metrics
    rows = board.rows()
    assert set(rows) == {f"mtp.depth-{d}_seed-{s}" for d in (0, 1) for s in (0, 1)}
    run_keys, values, _ = rows["mtp.depth-1_seed-1"]
    assert (run_keys["mtp.depth"], run_keys["seed"]) == (1, 1)
    assert values["val/loss_depth_0"] == 1.0 and values["progress/seconds"] == 1.5


def test_hparams_of_a_task_begin_with_exact_match(tmp_path: Path) -> None:
    task_run(tmp_path / "a", rights=(0.5, 1.0), summary={"val/longer/exact_match": 0.1})
    report([tmp_path])
    _, metrics = Board(tmp_path).columns()
    assert metrics[:3] == ["val/exact_match", "val/longer/exact_match", "val/loss_depth_0"]


def test_the_figures_are_in_tensorboard(sweep: Path) -> None:
    reader = EventAccumulator(str(sweep / "figures"), size_guidance={"images": 0})
    reader.Reload()
    tags = reader.Tags()["images"]
    assert "report/Loss against FLOPs" in tags
    assert len(tags) == len(list((sweep / "figures").glob("*.png")))
    for tag in tags:
        (image,) = reader.Images(tag)
        assert image.encoded_image_string[:4] == b"\x89PNG"
        assert image.width > image.height > 300
