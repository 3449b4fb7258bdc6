"""conf/callbacks and conf/logger compose what they name, one alone or several."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

CONF = Path(__file__).parents[2] / "conf"
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
        (["callbacks=gradient_conflict"], DEFAULT | {"GradientConflict"}, LOGGERS),
        (["callbacks=early_stopping"], DEFAULT | {"EarlyStopping"}, LOGGERS),
        (
            ["callbacks=[learning_rate,early_stopping]"],
            DEFAULT | {"EarlyStopping", "LearningRateMonitor"},
            LOGGERS,
        ),
        (["callbacks=[default,learning_rate]"], DEFAULT | {"LearningRateMonitor"}, LOGGERS),
        (["callbacks=[nan_guard,progress]"], {"NanGuard", "StepProgressBar"}, LOGGERS),
        (["~callbacks.progress"], DEFAULT - {"StepProgressBar"}, LOGGERS),
        (["callbacks=[]", "logger=[]"], set(), set()),
        (["callbacks=long_range"], DEFAULT | {"LongRange"}, LOGGERS),
        (["callbacks=sampled_acceptance"], DEFAULT | {"SampledAcceptance"}, LOGGERS),
        (["callbacks=floor_and_gap"], DEFAULT | {"FloorAndGap"}, LOGGERS),
        (["callbacks=[long_range,floor_and_gap]"], DEFAULT | {"LongRange", "FloorAndGap"}, LOGGERS),
        (["callbacks=[stop_when_solved]"], DEFAULT | {"StopWhenSolved"}, LOGGERS),
        (["logger=csv"], DEFAULT, {"MetricsCSV"}),
        (["logger=[csv,default]"], DEFAULT, LOGGERS),
        (["~logger.tensorboard"], DEFAULT, {"MetricsCSV"}),
    ],
)
def test_composes(overrides: list[str], callbacks: set[str], loggers: set[str]) -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=overrides)
    for group, classes in (("callbacks", callbacks), ("logger", loggers)):
        nodes = (cfg.get(group) or {}).values()
        assert {node._target_.split(".")[-1] for node in nodes} == classes


def test_loggers_beside_the_default_ones() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose(
            "config", overrides=["logger=[default,wandb,mlflow,trackio]", "paths.output_dir=r"]
        )
        alone = compose("config", overrides=["logger=wandb"])
    assert list(cfg.logger) == ["csv", "tensorboard", "wandb", "mlflow", "trackio"]
    assert {node.folder for node in cfg.logger.values()} == {"r"}
    assert list(alone.logger) == ["wandb"]
