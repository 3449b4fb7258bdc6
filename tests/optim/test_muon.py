"""Muon on CPUs, against its formulas in float64 and against ``torch.optim.Muon``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtp_lightning.optim.muon import Muon

A, B, C = 3.4445, -4.7750, 2.0315
SHAPES = ((8, 8), (12, 5), (5, 12), (1, 7))


def expected(
    weight: np.ndarray, grads: list[np.ndarray], scale: float, **settings: Any
) -> np.ndarray:
    """The weight after some steps, by the singular values of every update."""
    mean = np.zeros_like(weight)
    for grad in grads:
        mean = settings["momentum"] * mean + (1 - settings["momentum"]) * grad
        ahead = settings["momentum"] * mean + (1 - settings["momentum"]) * grad
        update = ahead if settings["nesterov"] else mean
        left, values, right = np.linalg.svd(update, full_matrices=False)
        values = values / np.linalg.norm(values)
        for _ in range(5):
            values = A * values + B * values**3 + C * values**5
        weight = weight * (1 - settings["lr"] * settings["weight_decay"])
        weight = weight - settings["lr"] * scale * (left * values) @ right
    return weight


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_steps_are_those_of_the_formulas_in_float64(nesterov: bool, adjust: str | None) -> None:
    settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    generator = torch.Generator().manual_seed(0)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator)

    weights = [torch.nn.Parameter(random(*shape)) for shape in SHAPES]
    before = [weight.detach().double().numpy() for weight in weights]
    optimizer = Muon(weights, adjust_lr_fn=adjust, **settings)
    grads = [[random(*shape) for shape in SHAPES] for _ in range(3)]
    for step in grads:
        for weight, grad in zip(weights, step, strict=True):
            weight.grad = grad.clone()
        optimizer.step()
    for i, (rows, columns) in enumerate(SHAPES):
        scale = max(1, rows / columns) ** 0.5 if adjust is None else 0.2 * max(rows, columns) ** 0.5
        history = [step[i].double().numpy() for step in grads]
        after = expected(before[i], history, scale, **settings)
        np.testing.assert_allclose(weights[i].detach().numpy(), after, rtol=2e-4, atol=2e-5)


def test_torch_s_muon_differs_by_the_rounding_of_bf16_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    ours, theirs = ([torch.nn.Parameter(torch.zeros(s)) for s in SHAPES] for _ in range(2))
    optimizers = Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert 0 < (a - b).norm() < 0.03 * b.norm()
    states = (optimizer.state_dict() for optimizer in optimizers)
    assert len({str(state) for state in states}) == 1


def test_parameters_without_a_gradient_stay_and_the_closure_s_loss_is_returned() -> None:
    trained, idle = (torch.nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = Muon([trained, idle], lr=0.1)

    def closure() -> Any:
        loss = (trained**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 6
    assert torch.equal(idle, torch.ones(3, 2)) and not torch.equal(trained, idle)
