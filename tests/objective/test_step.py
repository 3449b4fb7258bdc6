"""One optimizer step: active depths, FLOPs, accumulation, and the effect of balance rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.errors import UserError
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import Balance, NoBalance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.dwa import DWA
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.random_weights import RandomWeights
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.balance.trunk_ratio import TrunkRatio
from mtp_lightning.objective.balance.uncertainty import Uncertainty
from mtp_lightning.objective.cost import counted_flops
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep, StepResult
from tests.models import target_counts, windows

DEPTH = 2
RULES: dict[str, Callable[[int], Balance]] = {
    "none": NoBalance,
    "dwa": lambda depth: DWA(depth, window_steps=1),
    "uncertainty": Uncertainty,
    "gradnorm": GradNorm,
    "cosine_gate": CosineGate,
    "trunk_ratio": lambda depth: TrunkRatio(depth, every_n_steps=1),
    "random": lambda depth: RandomWeights(depth, seed=0),
    "sampled_depths": lambda depth: SampledDepths(depth, seed=0, probabilities="loss_ratio"),
}


class Training:
    """A small model in float64, with a rule, an optimizer and a step that train it.

    Attributes:
        gradients: those of the model's parameters in the last step, by name.
    """

    def __init__(
        self,
        trunk: TrunkConfig,
        variant: str,
        rule: Balance,
        *,
        weight: float = 0.3,
        max_steps: int = 100,
        clip_norm: float | None = 1.0,
        accumulate: int = 1,
        counts: bool = False,
        **switches: Any,
    ) -> None:
        mtp = MTPConfig.find(variant)(depth=rule.depth, **switches)
        self.model = MTPModel(ModelConfig(trunk=trunk, mtp=mtp))
        self.model.initialize(0)
        self.model.double()
        self.rule, self.max_steps, self.steps = rule, max_steps, 0
        parameters = [*self.model.parameters(), *rule.parameters()]
        self.optimizer = torch.optim.SGD([p for p in parameters if p.requires_grad], lr=0.01)
        self.optimizer.register_step_pre_hook(lambda *_: self._record())
        self.gradients: dict[str, Tensor] = {}
        schedule = Piecewise(rule.depth, weight)
        self.step = OptimizerStep(
            self.model, schedule=schedule, balance=rule, clip_norm=clip_norm, accumulate=accumulate
        )
        if not counts:  # counting FLOPs takes longer than the step
            self.step.cost = lambda *_, **__: 0  # type: ignore[assignment]

    def _record(self) -> None:
        parameters = self.model.named_parameters()
        self.gradients = {n: p.grad.clone() for n, p in parameters if p.grad is not None}

    def __call__(self, batch: WindowBatch) -> StepResult:
        progress = Progress(step=self.steps, max_steps=self.max_steps)
        self.steps += 1
        return self.step(batch, progress, self.optimizer)


def documents_of(length: int) -> WindowBatch:
    """Windows of documents of ``length`` tokens."""
    generator = torch.Generator().manual_seed(length)
    shape = (2, 12 + DEPTH + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    return WindowBatch(tokens, DEPTH, (torch.arange(shape[1]) // length).expand(shape))


@pytest.mark.parametrize(
    ("variant", "rule"), [*(("sequential", rule) for rule in RULES), ("parallel", "gradnorm")]
)
def test_a_depth_without_a_target_is_not_computed(
    tiny_trunk: TrunkConfig, variant: str, rule: str
) -> None:
    """Depth 2 has no target in documents of three tokens, depth 1 none in those of two."""
    training = Training(tiny_trunk, variant, RULES[rule](DEPTH))
    for length, with_targets in ((5, {1, 2}), (3, {1}), (2, set()), (3, {1}), (5, {1, 2})):
        batch = documents_of(length)
        assert {k for k in (1, 2) if target_counts(batch)[k]} == with_targets
        result = training(batch)
        assert set(result.plan.active) <= with_targets
        if rule != "sampled_depths":  # which computes one of them
            assert set(result.plan.active) == with_targets
        elif with_targets:
            assert len(result.plan.active) == 1
        assert torch.isfinite(result.losses).all() and torch.isfinite(result.loss)
        values = {tag: float(value) for tag, value in result.values.items()}
        assert all(value == value for value in values.values()), values
        for k in {1, 2} - set(result.plan.active):
            assert values[f"train/lambda_depth_{k}"] == 0.0
            assert f"train/loss_depth_{k}" not in values
        assert all(torch.isfinite(p).all() for p in training.model.parameters())
        assert any(name.startswith("mtp.depths.1") for name in training.gradients) == (
            2 in result.plan.active
        )
        if isinstance(training.rule, DWA | GradNorm):
            factors = training.rule.factors([1.0, 0.5, 0.5], Progress(training.steps, 100))
            assert all(factor == factor for factor in factors)


@pytest.mark.parametrize(
    ("variant", "switches"),
    [("sequential", {}), ("parallel", {"correction": "mlp"}), ("masked", {"freeze_trunk": True})],
)
def test_flops_of_depths_with_a_target_are_those_of_pytorchs_operators(
    tiny_trunk: TrunkConfig, variant: str, switches: dict[str, Any]
) -> None:
    """``test_cross_product.py`` compares every head where all depths have targets."""
    training = Training(tiny_trunk, variant, NoBalance(DEPTH), counts=True, **switches)
    for length, active in ((3, [1]), (2, [])):
        with counted_flops() as counted:
            result = training(documents_of(length))
        assert result.plan.active == active
        assert result.flops == counted.total > 0


@pytest.mark.parametrize(
    ("variant", "rule"),
    [("sequential", "none"), ("parallel", "dwa"), ("sequential", "sampled_depths")],
)
def test_a_frozen_trunk_has_a_main_prediction_only_for_rules_that_need_it(
    tiny_trunk: TrunkConfig, variant: str, rule: str
) -> None:
    """The losses of the modules are the same."""
    frozen, detached = (
        Training(tiny_trunk, variant, RULES[rule](DEPTH), **switches)(documents_of(5))
        for switches in ({"freeze_trunk": True}, {"detach": "all"})
    )
    assert "train/loss_depth_0" in detached.values
    assert ("train/loss_depth_0" in frozen.values) == (rule == "dwa")
    assert torch.equal(frozen.losses[1:], detached.losses[1:])
    if rule == "none":
        assert frozen.losses[0] == 0 and frozen.plan.tasks == [1, 2]
        total = sum(frozen.plan.factors[k] * frozen.losses[k] for k in (1, 2))
        assert float(frozen.loss) == pytest.approx(float(total))


@pytest.mark.parametrize(
    ("rule", "variant"),
    [
        *((rule, "sequential") for rule in ("none", "dwa", "uncertainty", "gradnorm")),
        *((rule, "parallel") for rule in ("cosine_gate", "trunk_ratio", "sampled_depths")),
    ],
)
def test_accumulated_micro_batches_train_as_one_batch(
    tiny_trunk: TrunkConfig, rule: str, variant: str
) -> None:
    whole, parts = (Training(tiny_trunk, variant, RULES[rule](DEPTH), accumulate=n) for n in (1, 2))
    batch = windows(4, 12, DEPTH, borders=0.15)  # documents of uneven lengths
    assert len({tuple(target_counts(m).tolist()) for m in batch.micro_batches(2)}) > 1
    for _ in range(2):
        expected, accumulated = (
            {tag: float(value) for tag, value in training(batch).values.items()}
            for training in (whole, parts)
        )
        assert accumulated == pytest.approx(expected, rel=1e-6, abs=1e-9)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert str(whole.rule.state_dict().keys()) == str(parts.rule.state_dict().keys())


def test_gradients_are_clipped_and_the_logged_norm_is_that_before(tiny_trunk: TrunkConfig) -> None:
    free, clipped = (
        Training(tiny_trunk, "sequential", NoBalance(DEPTH), clip_norm=bound)
        for bound in (None, 0.01)
    )
    results = [training(documents_of(5)) for training in (free, clipped)]
    norms = [float(result.values["train/grad_norm"]) for result in results]
    assert norms[0] == pytest.approx(norms[1]) and norms[0] > 0.1
    for name, gradient in clipped.gradients.items():
        scaled = free.gradients[name] * (0.01 / norms[0])
        torch.testing.assert_close(gradient, scaled, rtol=1e-4, atol=0)


def test_random_keys_number_the_windows_of_all_ranks(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mtp_lightning.objective.step.rank", lambda: 2)
    training = Training(tiny_trunk, "sequential", NoBalance(DEPTH), accumulate=2)
    plan = training.step.plan(windows(6, 12, DEPTH), Progress(step=5, max_steps=9))
    assert [m.key for m in plan.micro_batches] == [RandomKey(0, 5, row) for row in (12, 15)]


@pytest.mark.parametrize("accumulate", [0, 7])
def test_micro_batches_without_a_window_are_refused(
    tiny_trunk: TrunkConfig, accumulate: int
) -> None:
    training = Training(tiny_trunk, "sequential", NoBalance(DEPTH), accumulate=accumulate)
    with pytest.raises(UserError, match=rf"accumulate must be .* in \[1, 6\], not {accumulate}"):
        training(windows(6, 12, DEPTH))


@pytest.mark.parametrize(
    ("rule", "where", "every"),
    [
        (GradNorm(DEPTH, every_n_steps=2), "", 2),
        (CosineGate(DEPTH), "trunk_", 1),
        (TrunkRatio(DEPTH, every_n_steps=2, frozen=0.1), "trunk_", 2),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_measuring_rules_log_norms_and_count_their_cost(
    tiny_trunk: TrunkConfig, rule: Balance, where: str, every: int
) -> None:
    training = Training(tiny_trunk, "sequential", rule, max_steps=10, counts=True)
    batch = WindowBatch(documents_of(5).tokens, DEPTH)
    results = [training(batch) for _ in range(10)]
    tags = [f"grad/{where}norm_depth_{k}" for k in range(3)]
    last = 9 if rule.name == "trunk_ratio" else 10  # it measures nothing in the last tenth
    assert [[tag in result.values for tag in tags] for result in results] == [
        [step % every == 0 and step <= last] * 3 for step in range(1, 11)
    ]
    plain = 10 * 2 * training.step.cost(12, [1, 2])
    assert 1.2 * plain < sum(result.flops for result in results) < 3.5 * plain


def test_a_closed_cosine_gate_changes_only_the_gradients_of_the_trunk(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trunk trains as if detached, and modules still learn."""
    monkeypatch.setattr(CosineGate, "is_open", lambda self, k: False)
    # Without clipping, whose norm is over all parameters.
    closed, plain, fixed = (
        Training(tiny_trunk, "sequential", rule(DEPTH), weight=weight, clip_norm=None)
        for rule, weight in ((CosineGate, 0.3), (NoBalance, 0.0), (NoBalance, 0.3))
    )
    result, *_ = [training(documents_of(5)) for training in (closed, plain, fixed)]
    norm = torch.stack([gradient.norm() for gradient in closed.gradients.values()]).norm()
    assert float(result.values["train/grad_norm"]) == pytest.approx(float(norm)), "gated first"
    trunk = [n for n in closed.gradients if n.startswith(("trunk.blocks.", "trunk.norm."))]
    assert len(trunk) > 5
    for name, gradient in closed.gradients.items():
        expected = (plain if name in trunk else fixed).gradients[name]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-9, msg=name)
    assert any(not torch.allclose(plain.gradients[n], fixed.gradients[n], rtol=1e-3) for n in trunk)


@pytest.mark.parametrize(
    ("depth", "masks", "message"),
    [
        (DEPTH, [torch.arange(6).unsqueeze(0)], "no valid target: every position crosses a doc"),
        (DEPTH, [None, torch.zeros(1, 6).bool()], "no valid target: no token may be a target"),
        (DEPTH - 1, [], "built for mtp.depth=1 but the model's is 2"),
        (DEPTH + 1, [], "built for mtp.depth=3 but the model's is 2"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_is_refused(
    tiny_trunk: TrunkConfig, depth: int, masks: list[torch.Tensor | None], message: str
) -> None:
    training = Training(tiny_trunk, "sequential", NoBalance(DEPTH))
    with pytest.raises(ValueError, match=message):
        training(WindowBatch(torch.zeros(1, 6).long(), depth, *masks))


@pytest.mark.parametrize("factors", [[0.3], [0.3, 0.3, 0.3]])
def test_a_users_factors_for_other_depths_are_refused(
    tiny_trunk: TrunkConfig, factors: list[float]
) -> None:
    class Uneven(Balance):
        name = "users"

        def factors(self, lambdas, progress):
            return [1.0, *factors]

    with pytest.raises(ValueError, match=f"Uneven gives factors for {len(factors)} depths"):
        Training(tiny_trunk, "sequential", Uneven(DEPTH))(documents_of(20))


def test_several_processes_without_summed_gradients_are_refused(
    tiny_trunk: TrunkConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tiny_trunk, "sequential", NoBalance(DEPTH))
    monkeypatch.setattr("mtp_lightning.objective.step.world_size", lambda: 2)
    with pytest.raises(ValueError, match="2 processes would each train a model of their own"):
        training(documents_of(20))
