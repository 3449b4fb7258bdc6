"""The hyperparameters of a run in TensorBoard's HPARAMS tab."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from mtp_lightning.experiment.compose import hyperparameters
from tests.integration.helpers import CONF, composed, typed


@pytest.fixture(autouse=True)
def no_hydra_config() -> Iterator[None]:
    yield
    HydraConfig.instance().cfg = None


def started_with(*overrides: str) -> DictConfig:
    """The config of a command line, as Hydra leaves it for the app."""
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg.hydra
    return cfg


def test_hyperparameters_are_the_keys_of_the_command_line() -> None:
    expected = typed("mtp=parallel mtp.depth=3 seed=7 callbacks.speculative_eval.n_prompts=1")
    expected |= {"callbacks": "[early_stopping,learning_rate]", "+trainer.profiler": "simple"}
    expected |= {"mtp_lambda": [0.3, 0.2, 0.1], "optimizer.lr": 0.01}
    arguments = [f"{key}={value}".replace(" ", "") for key, value in expected.items()]
    arguments += ["run_dir=runs/x", "logger=[csv,wandb]", "callbacks.progress.line_seconds=1"]
    expected = {key.lstrip("+"): value for key, value in expected.items()}
    assert hyperparameters(started_with(*arguments)) == expected


def test_every_way_to_set_no_depth_gives_the_same_hyperparameters() -> None:
    none = {"mtp.depth": 0, "mtp_lambda": 0.3, "seed": 0, "mtp": "none"}
    assert hyperparameters(started_with("mtp=none")) == none
    assert hyperparameters(started_with("mtp.depth=0")) == none
    assert hyperparameters(started_with("mtp=linear", "mtp.depth=0", "mtp.branch=final")) == none
    # teacherless has no depth either, but is another head.
    assert hyperparameters(started_with("mtp=teacherless"))["mtp"] == "teacherless"


def test_hyperparameters_without_a_command_line_are_three_keys() -> None:
    cfg = composed("config", ["optimizer.lr=0.01"])
    assert hyperparameters(cfg) == {"mtp.depth": 2, "mtp_lambda": 0.3, "seed": 0}
