"""The decoding check of a validation."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.model import MTPModel
from mtp_lightning.paths import ROOT
from tests.decoding.models import small_model


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="n_prompts must be a whole number of at least 1, not 0"):
        SpeculativeEval(n_prompts=0)


def test_a_run_and_evaluate_decode_the_same_by_default() -> None:
    conf = ROOT / "conf"
    run = yaml.safe_load((conf / "callbacks/speculative_eval.yaml").read_text())["speculative_eval"]
    evaluate = yaml.safe_load((conf / "evaluate.yaml").read_text())["decode"]
    parameters = inspect.signature(SpeculativeEval).parameters
    assert list(parameters) == ["n_prompts", "prompt_tokens", "new_tokens"]
    for key, parameter in parameters.items():
        assert run[key] == evaluate[key] == parameter.default
    assert run["n_prompts"] >= 64


class _Module:
    """What the callback needs of a module."""

    def __init__(self, model: MTPModel) -> None:
        self.whole_model = lambda: model
        self.logged: dict[str, Any] = {}

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logged |= values


def test_a_window_without_room_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    data = SimpleNamespace(seq_len=64, answer_length=None)
    trainer: Any = SimpleNamespace(sanity_checking=False, is_global_zero=True, datamodule=data)
    module: Any = _Module(small_model(0, 2))
    callback = SpeculativeEval(new_tokens=64)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            callback.on_validation_epoch_end(trainer, module)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    told = callback.summary()["not_decoded"]
    assert "data.seq_len=64 leaves no room" in told and "new_tokens=64" in told
    assert told in caplog.text and not module.logged
