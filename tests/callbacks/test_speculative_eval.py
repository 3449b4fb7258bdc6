"""The decoding at each validation: its settings, values and refusals."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from data_modules.tokenizers import ByteTokenizer
from mtp_lightning.callbacks.long_range import acceptance_on_long_texts
from mtp_lightning.callbacks.sampled_acceptance import SampledAcceptance
from mtp_lightning.callbacks.speculative_eval import SpeculativeEval
from mtp_lightning.errors import UserError
from mtp_lightning.model import MTPModel
from mtp_lightning.paths import ROOT
from tests.decoding.models import random_prompts, small_model


def test_a_run_and_evaluate_decode_the_same_by_default() -> None:
    conf = ROOT / "conf"
    run = OmegaConf.load(conf / "callbacks/speculative_eval.yaml").speculative_eval
    evaluate = yaml.safe_load((conf / "evaluate.yaml").read_text())["decode"]
    parameters = inspect.signature(SpeculativeEval).parameters
    assert list(parameters) == ["n_prompts", "prompt_tokens", "new_tokens"]
    for key, parameter in parameters.items():
        assert run[key] == evaluate[key] == parameter.default
    assert run["n_prompts"] >= 64


class _Module:
    """The parts of a module that the callback uses."""

    def __init__(self, model: MTPModel) -> None:
        self.whole_model = lambda: model
        self.logged: dict[str, Any] = {}

    def log_dict(self, values: dict[str, Any], **_: Any) -> None:
        self.logged |= values


@pytest.mark.parametrize("kind", [SpeculativeEval, SampledAcceptance])
def test_a_window_without_room_for_new_tokens_warns_once(
    kind: type[SpeculativeEval], caplog: pytest.LogCaptureFixture
) -> None:
    data = SimpleNamespace(seq_len=64, answer_length=None)
    trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=data)
    module: Any = _Module(small_model(0, 2))
    callback = kind(new_tokens=64)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            callback.on_validation_epoch_end(trainer, module)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    reason = callback.summary()["not_decoded"]
    assert "data.seq_len=64 leaves no room" in reason and "new_tokens=64" in reason
    assert reason in caplog.text and not module.logged


def measured(callback: SpeculativeEval, model: MTPModel) -> dict[str, float]:
    """The values that a validation logs for 12 prompts."""
    prompts = [torch.tensor(ids) for ids in random_prompts(3, (5,) * 12)]
    data = SimpleNamespace(seq_len=64, answer_length=None, tokenizer=ByteTokenizer())
    data.held_out_prompts = lambda n, tokens, fewer: prompts[:n]
    trainer: Any = SimpleNamespace(is_global_zero=True, datamodule=data, loggers=[], global_step=1)
    module: Any = _Module(model)
    callback.on_validation_epoch_end(trainer, module)
    return module.logged


@pytest.mark.parametrize("kind", [SpeculativeEval, SampledAcceptance])
def test_texts_are_decoded_in_full_fp32(kind, monkeypatch) -> None:
    """With the TF32 of a GPU's training, drafts could change a text by more than a tie."""
    seen = []

    def measure(self, *_: object) -> dict[str, float]:
        seen.append(torch.get_float32_matmul_precision())
        return {}

    monkeypatch.setattr(kind, "measure", measure)
    torch.set_float32_matmul_precision("high")
    try:
        measured(kind(12, 5, 24), small_model(0, 2))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sampled_acceptance_near_temperature_0_equals_greedy() -> None:
    model = small_model(0, 2)
    greedy = measured(SpeculativeEval(12, 5, 24), model)
    cold = measured(SampledAcceptance(12, 5, 24, temperature=1e-6), model)
    warm = measured(SampledAcceptance(12, 5, 24), model)
    names = {"acceptance_position_1", "acceptance_position_2", "tokens_per_step"}
    names |= {f"{name}_{end}" for name in names for end in ("low", "high")}
    assert {f"decode/sampled/{name}" for name in (*names, "n_prompts")} == cold.keys()
    for name in names:
        assert cold[f"decode/sampled/{name}"] == greedy[f"decode/{name}"]
    assert warm != cold and warm == measured(SampledAcceptance(12, 5, 24), model)
    assert 1 < warm["decode/sampled/tokens_per_step"] < 3
    block = measured(SampledAcceptance(12, 5, 24, verify="block"), model)
    assert block != warm and 1 < block["decode/sampled/tokens_per_step"] < 3
    assert measured(SampledAcceptance(12, 5, 24), small_model(0, 0)) == {}


def test_only_a_text_without_prompts_is_skipped(caplog: pytest.LogCaptureFixture) -> None:
    """Any other error of the data is a defect and stops the run."""

    def raising(error: Exception) -> SimpleNamespace:
        def held_out_prompts(n: int, length: int) -> None:
            raise error

        return SimpleNamespace(seq_len=64, held_out_prompts=held_out_prompts)

    model = small_model(0, 2)
    few = raising(UserError("hold only 1 prompts"))
    assert acceptance_on_long_texts(model, few, n_prompts=2) == {}
    assert "hold only 1 prompts" in caplog.text
    with pytest.raises(ValueError, match="of a library"):
        acceptance_on_long_texts(model, raising(ValueError("of a library")), n_prompts=2)
