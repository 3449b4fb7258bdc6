"""conf/callbacks and conf/logger compose the named classes, which refuse wrong settings."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment

from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.callbacks.floor_and_gap import FloorAndGap
from mtp_lightning.callbacks.gradient_conflict import GradientConflict
from mtp_lightning.callbacks.nan_guard import NanGuard
from mtp_lightning.callbacks.sampled_acceptance import SampledAcceptance
from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.callbacks.throughput import Throughput
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.trainer import _slurm_environment, build_trainer
from tests.integration.helpers import composed

DEFAULT = {
    "NanGuard", "Throughput", "StepProgressBar", "Checkpoints", "SpeculativeEval", "ExactMatch",
}  # fmt: skip
LOGGERS = {"MetricsCSV", "RunTensorBoard"}


@pytest.mark.parametrize(
    ("overrides", "callbacks", "loggers"),
    [
        ([], DEFAULT, LOGGERS),
        (["callbacks=[default,learning_rate]"], DEFAULT | {"LearningRateMonitor"}, LOGGERS),
        (["callbacks=[long_range,floor_and_gap]"], DEFAULT | {"LongRange", "FloorAndGap"}, LOGGERS),
        (["callbacks=[nan_guard,progress]"], {"NanGuard", "StepProgressBar"}, LOGGERS),
        (["~callbacks.progress"], DEFAULT - {"StepProgressBar"}, LOGGERS),
        (["callbacks=[]", "logger=[]"], set(), set()),
        (["~logger.tensorboard"], DEFAULT, {"MetricsCSV"}),
    ],
)
def test_callbacks_and_loggers_are_composed_as_named(overrides, callbacks, loggers):
    cfg = composed("config", overrides)
    for group, classes in (("callbacks", callbacks), ("logger", loggers)):
        nodes = (cfg.get(group) or {}).values()
        assert {node._target_.split(".")[-1] for node in nodes} == classes


def test_a_callback_or_logger_set_to_null_is_left_out(tmp_path: Path) -> None:
    null = ["callbacks.speculative_eval=null", "logger.tensorboard=null"]
    settings = ["trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=1"]
    cfg = composed("config", [*null, *settings, f"paths.output_dir={tmp_path}"])
    trainer = build_trainer(cfg, resume_step=None, may_skip=False)
    assert not any(isinstance(callback, SpeculativeEval) for callback in trainer.callbacks)
    assert len(trainer.loggers) == 1


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "LightningEnvironment"),
        ({"SLURM_NTASKS": "4"}, "LightningEnvironment"),  # a batch script without srun
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, "LightningEnvironment"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2"},
         "SLURMEnvironment"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
          "SLURM_JOB_NAME": "interactive"}, "SLURMEnvironment"),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}, "Use `--ntasks-per-node=2` instead"),
    ],
)  # fmt: skip
def test_slurms_tasks_are_a_runs_processes_under_srun_alone(
    environment, expected, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", **environment})
    if not expected.endswith("Environment"):
        with pytest.raises(UserError, match=expected):
            _slurm_environment()
        return
    (found,) = _slurm_environment() or [LightningEnvironment()]
    assert type(found).__name__ == expected
    assert not getattr(found, "auto_requeue", False), "Lightning's would save within a step"


def test_loggers_are_added_to_the_default_ones() -> None:
    cfg = composed("config", ["logger=[default,wandb,mlflow,trackio]", "paths.output_dir=r"])
    assert list(cfg.logger) == ["csv", "tensorboard", "wandb", "mlflow", "trackio"]
    assert {node.folder for node in cfg.logger.values()} == {"r"}
    assert list(composed("config", ["logger=wandb"]).logger) == ["wandb"]


@pytest.mark.parametrize(
    ("kind", "key", "value", "message"),
    [
        (partial(Checkpoints, "c"), "every_n_steps", 0, "at least 1, not 0"),
        (partial(Checkpoints, "c"), "mode", "low", "mode=low is unknown"),
        (NanGuard, "every_n_steps", 0, "at least 1, not 0"),
        (Throughput, "every_n_steps", 0, "at least 1, not 0"),
        (GradientConflict, "every_n_steps", 0, "at least 1, not 0"),
        (SpeculativeEval, "n_prompts", 0, "at least 1, not 0"),
        (FloorAndGap, "rollouts", 0, "at least 1, not 0"),
        (SampledAcceptance, "verify", "tokens", "verify=tokens is unknown"),
        (SampledAcceptance, "temperature", 0, "a number above 0, not 0"),
        (SampledAcceptance, "temperature", float("inf"), "a number above 0, not inf"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_key(kind, key, value, message):
    with pytest.raises(ValueError, match=rf"^callbacks\.\w+\.(?={key}).*{message}"):
        kind(**{key: value})


def test_a_subclass_refuses_the_wrong_settings_of_its_base() -> None:
    class Subclass(SpeculativeEval):
        pass

    with pytest.raises(ValueError, match="n_prompts must be a whole number of at least 1, not 0"):
        Subclass(n_prompts=0)
    assert Subclass(n_prompts=3).n_prompts == 3
