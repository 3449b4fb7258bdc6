"""Sampled depths on real models: the expected gradient is that of all depths."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mtp_lightning.model import MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.schedule.base import Progress
from tests.losses import mtp_loss
from tests.models import build, windows

BASE = [1.0, 0.3, 0.2, 0.1]


def gradients(model: MTPModel, factors: Sequence[float]) -> dict[str, Tensor]:
    batch = windows(3, 10, 3)
    mtp_loss(model, batch, factors[1:], [30] * 4, main=factors[0])[0].backward()
    # A parameter that the drawn depth does not use gets no gradient.
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    model.zero_grad(set_to_none=True)
    return grads


@pytest.mark.parametrize(
    ("variant", "probabilities"),
    [("sequential", "uniform"), ("parallel", [5.0, 3.0, 2.0]), ("parameter_free", "uniform")],
)
def test_the_mean_gradient_over_many_draws_is_the_full_gradient(
    tiny_trunk: TrunkConfig, variant: str, probabilities: str | list[float]
) -> None:
    model = build(tiny_trunk, MTPConfig.find(variant)(depth=3)).double()
    rule = SampledDepths(3, seed=11, probabilities=probabilities)
    drawn: dict[tuple[float, ...], int] = {}
    for step in range(3000):
        factors = tuple(rule.factors(BASE, Progress(step=step, max_steps=3000)))
        drawn[factors] = drawn.get(factors, 0) + 1
    assert len(drawn) == 3  # a gradient is computed once for every outcome
    mean: dict[str, Tensor] = {}
    for factors, count in drawn.items():
        for name, grad in gradients(model, factors).items():
            mean[name] = mean.get(name, 0) + grad * (count / 3000)
    full = gradients(model, BASE)
    plain = gradients(model, [1.0, 0.0, 0.0, 0.0])
    for name, grad in full.items():
        # Within the spread of 3000 draws; without the division by p it would be off by 2/3.
        effect = float((grad - plain[name]).norm())
        assert float((mean[name] - grad).norm()) < 0.1 * effect + 1e-9, name
    assert any(float((full[n] - plain[n]).norm()) > 1e-3 for n in full)
