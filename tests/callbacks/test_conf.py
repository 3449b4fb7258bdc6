"""conf/callbacks and conf/logger compose what they name, one alone or several."""

from __future__ import annotations

import pytest

from tests.integration.helpers import composed

DEFAULT = {
    "NanGuard",
    "Throughput",
    "StepProgressBar",
    "Checkpoints",
    "SpeculativeEval",
    "ExactMatch",
}
LOGGERS = {"MetricsCSV", "RunTensorBoard"}


@pytest.mark.parametrize(
    ("overrides", "callbacks", "loggers"),
    [
        ([], DEFAULT, LOGGERS),
        (["callbacks=early_stopping"], DEFAULT | {"EarlyStopping"}, LOGGERS),
        (["callbacks=[default,learning_rate]"], DEFAULT | {"LearningRateMonitor"}, LOGGERS),
        (["callbacks=[long_range,floor_and_gap]"], DEFAULT | {"LongRange", "FloorAndGap"}, LOGGERS),
        (["callbacks=[nan_guard,progress]"], {"NanGuard", "StepProgressBar"}, LOGGERS),
        (["~callbacks.progress"], DEFAULT - {"StepProgressBar"}, LOGGERS),
        (["callbacks=[]", "logger=[]"], set(), set()),
        (["logger=[csv,default]"], DEFAULT, LOGGERS),
        (["~logger.tensorboard"], DEFAULT, {"MetricsCSV"}),
    ],
)
def test_composes(overrides: list[str], callbacks: set[str], loggers: set[str]) -> None:
    cfg = composed("config", overrides)
    for group, classes in (("callbacks", callbacks), ("logger", loggers)):
        nodes = (cfg.get(group) or {}).values()
        assert {node._target_.split(".")[-1] for node in nodes} == classes


def test_loggers_beside_the_default_ones() -> None:
    cfg = composed("config", ["logger=[default,wandb,mlflow,trackio]", "paths.output_dir=r"])
    assert list(cfg.logger) == ["csv", "tensorboard", "wandb", "mlflow", "trackio"]
    assert {node.folder for node in cfg.logger.values()} == {"r"}
    assert list(composed("config", ["logger=wandb"]).logger) == ["wandb"]
