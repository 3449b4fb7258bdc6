"""What the stacks without token predictions cost, against PyTorch's own operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from mtp_lightning.model import ModelConfig
from mtp_lightning.mtp.bag import BagConfig
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.mtp.registers import RegistersConfig
from mtp_lightning.mtp.top import TopConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.cost import counted_flops
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.step_plan import StepResult
from tests import closed_forms
from tests.models import build
from tests.mtp.summaries import ahead_windows

STACKS = {
    "top": TopConfig(lookahead=6),
    "top_cut": TopConfig(lookahead=6, detach="trunk"),
    "top_frozen": TopConfig(lookahead=6, freeze_trunk=True),
    "bag": BagConfig(lookahead=6),
    "registers": RegistersConfig(lookahead=6),
}


def trained(
    trunk: TrunkConfig, mtp: MTPConfig, balance: Balance | None = None, weight: float = 0.3
) -> tuple[StepResult, int]:
    """One step over windows with documents, and the FLOPs of its products."""
    model = build(trunk, mtp).double()
    step = OptimizerStep(
        model,
        schedule=Piecewise(1, weight),
        balance=NoBalance(1) if balance is None else balance,
        accumulate=2,
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    batch = ahead_windows(4, 12, 6, documents=True)
    with counted_flops() as counted:
        result = step(batch, Progress(step=0, max_steps=10, tokens=0), optimizer)
    return result, counted.total


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_a_step_and_the_parameters(tiny_trunk: TrunkConfig, name: str, tied: bool) -> None:
    trunk = replace(tiny_trunk, tie_embeddings=tied)
    config = ModelConfig(trunk=trunk, mtp=STACKS[name])
    result, counted = trained(trunk, config.mtp)
    assert result.plan.active == [1]
    assert result.flops == counted == 4 * 12 * closed_forms.training(config, 12, [1]) > 0


@pytest.mark.parametrize("name", ["top", "bag", "registers"])
def test_a_depth_of_weight_0_costs_nothing(tiny_trunk: TrunkConfig, name: str) -> None:
    result, counted = trained(tiny_trunk, STACKS[name], weight=0.0)
    config = ModelConfig(trunk=tiny_trunk, mtp=STACKS[name])
    plain = closed_forms.training(config, 12, [])
    assert result.flops == counted == 4 * 12 * plain


@pytest.mark.parametrize("rule", [CosineGate, GradNorm])
@pytest.mark.parametrize("name", ["top", "bag", "registers"])
def test_what_a_balance_rule_measures(tiny_trunk: TrunkConfig, name: str, rule: Any) -> None:
    balance = rule(1)
    result, counted = trained(tiny_trunk, STACKS[name], balance)
    tags = [tag for tag in result.values if tag.startswith("grad/")]
    assert tags and all(float(result.values[tag]) == float(result.values[tag]) for tag in tags)
    assert result.flops == counted


@pytest.mark.parametrize("name", ["top", "bag", "registers"])
def test_measured_gradients_are_the_objectives(tiny_trunk: TrunkConfig, name: str) -> None:
    """``g_0 + lambda g_1`` is what training accumulates on the trunk."""
    trunk = replace(tiny_trunk, tie_embeddings=False)
    model = build(trunk, STACKS[name]).double()
    step = OptimizerStep(model, schedule=Piecewise(1, 0.3), balance=NoBalance(1), accumulate=2)
    batch = ahead_windows(4, 12, 6, documents=True, scored=True)
    plan = step.plan(batch, Progress(step=0, max_steps=10, tokens=0))
    parameters = list(model.trunk.blocks.parameters())
    (measured,) = plan.task_gradients(model, [1], {"trunk": parameters}).values()
    for micro, key in plan.micro_batches:
        loss, _, _ = step.loss(plan, micro, key)
        loss.backward()
    found = torch.cat([p.grad.flatten() for p in parameters])
    expected = measured.vectors[0] + 0.3 * measured.vectors[1]
    torch.testing.assert_close(found, expected)
    assert measured.norms[1] > 1e-6
