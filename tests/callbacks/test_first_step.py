"""The first step with all depths shows idle parameters and draws that no seed sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_run import TinyModule, fit
from torch import Tensor

from mtp_lightning.callbacks.first_step import FirstStep


class Odd(TinyModule):
    """Has a parameter that no loss depends on, and draws; its second depth begins at step 3."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Linear(2, 1)

    def _losses(self, batch: Tensor) -> Tensor:
        return super()._losses(batch) + torch.rand(())

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Any]:
        outputs = super().training_step(batch, batch_idx)
        return outputs | {"computed": [True, self.global_step >= 3]}


def warnings_in(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == "WARNING"]


def test_idle_parameters_and_draws_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    steps: list[tuple[int, int]] = []
    module = Odd()
    module.at_step = lambda _, step: steps.append((step, len(warnings_in(caplog))))
    fit(module, [FirstStep()], max_steps=5)
    assert steps == [(1, 0), (2, 0), (3, 0), (4, 2), (5, 2)]
    idle, draws = warnings_in(caplog)
    assert idle == "No loss depends on weight and 1 more, which no step changes."
    assert "cannot be repeated or resumed exactly" in draws


def test_a_sound_run_gets_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    fit(TinyModule(), [FirstStep()], max_steps=3)
    assert not warnings_in(caplog)
