"""One optimizer step: what it computes, and what it counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
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
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.step_plan import StepResult
from tests import closed_forms

DEPTH = 2
RULES = {
    "none": lambda: NoBalance(DEPTH),
    "dwa": lambda: DWA(DEPTH, window_steps=1),
    "uncertainty": lambda: Uncertainty(DEPTH),
    "gradnorm": lambda: GradNorm(DEPTH),
    "cosine_gate": lambda: CosineGate(DEPTH),
    "trunk_ratio": lambda: TrunkRatio(DEPTH, every_n_steps=1),
    "random": lambda: RandomWeights(DEPTH, seed=0),
    "sampled_depths": lambda: SampledDepths(DEPTH, seed=0, probabilities="loss_ratio"),
}


class Trained:
    """A small model and what trains it."""

    def __init__(self, trunk: TrunkConfig, variant: str, rule: Balance, **switches: Any) -> None:
        mtp = MTPConfig.find(variant)(depth=DEPTH, **switches)
        model = MTPModel(ModelConfig(trunk=trunk, mtp=mtp))
        model.initialise(0)
        self.model, self.rule = model, rule
        rule.check(model.config)
        parameters = [*model.parameters(), *rule.parameters()]
        parameters = [p for p in parameters if p.requires_grad]
        self.optimizer = torch.optim.SGD(parameters, lr=0.01)
        schedule = Piecewise(DEPTH, 0.3)
        self.step = OptimizerStep(model, schedule=schedule, balance=rule, clip_norm=1.0)
        self.steps = 0

    def __call__(self, batch: WindowBatch) -> StepResult:
        progress = Progress(step=self.steps, max_steps=100)
        self.steps += 1
        return self.step(batch, progress, self.optimizer)


def documents_of(length: int, *, windows: int = 2, seq_len: int = 12) -> WindowBatch:
    """Windows of documents of ``length`` tokens."""
    generator = torch.Generator().manual_seed(length)
    shape = (windows, seq_len + DEPTH + 1)
    tokens = torch.randint(0, 37, shape, generator=generator)
    return WindowBatch(tokens, DEPTH, (torch.arange(shape[1]) // length).expand(shape))


@pytest.mark.parametrize(
    ("variant", "rule"),
    [
        *(("sequential", rule) for rule in RULES),
        *((v, r) for v in ("parallel", "parameter_free") for r in ("none", "gradnorm")),
    ],
)
def test_a_depth_without_a_target_is_not_computed(
    tiny_trunk: TrunkConfig, variant: str, rule: str
) -> None:
    """In documents of three tokens depth 2 has no target, in those of two depth 1 has none."""
    trained = Trained(tiny_trunk, variant, RULES[rule]())
    for length, with_targets in ((5, {1, 2}), (3, {1}), (2, set()), (3, {1}), (5, {1, 2})):
        batch = documents_of(length)
        assert {k for k in (1, 2) if batch.counts()[k]} == with_targets
        result = trained(batch)
        assert set(result.plan.active) <= with_targets
        if rule != "sampled_depths":  # which computes one of them
            assert set(result.plan.active) == with_targets
        elif with_targets:
            assert len(result.plan.active) == 1
        assert torch.isfinite(result.losses).all() and torch.isfinite(result.loss)
        values = {tag: float(value) for tag, value in result.log_values().items()}
        assert all(value == value for value in values.values()), values
        for k in {1, 2} - set(result.plan.active):
            assert values[f"train/lambda_depth_{k}"] == 0.0
            assert f"train/loss_depth_{k}" not in values
        assert all(torch.isfinite(p).all() for p in trained.model.parameters())
        if isinstance(trained.rule, DWA | GradNorm):
            factors = trained.rule.factors([1.0, 0.5, 0.5], result.plan.progress)
            assert all(factor == factor for factor in factors)


def test_the_depth_without_a_target_is_taught_nothing(tiny_trunk: TrunkConfig) -> None:
    trained = Trained(tiny_trunk, "sequential", NoBalance(DEPTH))
    before = {n: p.detach().clone() for n, p in trained.model.named_parameters()}
    trained(documents_of(3))
    changed = {n for n, p in trained.model.named_parameters() if not torch.equal(p, before[n])}
    assert any(name.startswith("mtp.depths.0") for name in changed)
    assert not any(name.startswith("mtp.depths.1") for name in changed)


def test_flops_count_positions_without_a_target(tiny_trunk: TrunkConfig) -> None:
    plain, masked = (Trained(tiny_trunk, "sequential", NoBalance(DEPTH)) for _ in range(2))
    batch = documents_of(5)
    whole = plain(WindowBatch(batch.tokens, DEPTH))
    result = masked(batch)
    per_position = closed_forms.training(plain.model.config, batch.seq_len, [1, 2])
    assert result.flops == whole.flops == 2 * 12 * per_position
    assert result.tokens < whole.tokens == 2 * 12


CUT: list[dict[str, Any]] = [{"detach": "trunk"}, {"detach": "all"}, {"freeze_trunk": True}]


BRANCHES = ({"branch": "final"}, {"branch": "before_last"})
COUNTED: list[tuple[str, dict[str, Any]]] = [
    *((variant, {}) for variant in ("sequential", "parallel", "linear", "joint", "nextlat")),
    *(
        (variant, cut | branch)
        for variant in ("sequential", "linear")
        for cut in CUT
        for branch in BRANCHES
    ),
    ("eagle", {"draft_vocab": 11}),
    *(("masked", own) for own in ({}, {"freeze_trunk": True})),
    ("parallel", {"correction": "mlp"}),
    ("linear", {"correction": "mlp"}),
    ("linear", {"correction": "markov"}),
    ("parallel", {"correction": "selector", "correction_rank": 5}),
]


@pytest.mark.parametrize(("variant", "own"), COUNTED, ids=str)
def test_flops_are_those_of_pytorchs_operators(
    tiny_trunk: TrunkConfig, variant: str, own: dict[str, Any]
) -> None:
    trained = Trained(tiny_trunk, variant, NoBalance(DEPTH), **own)
    trained.model.double()
    for length, active in ((5, [1, 2]), (3, [1]), (2, [])):
        with counted_flops() as counted:
            result = trained(documents_of(length))
        assert result.plan.active == active
        assert result.flops == counted.total > 0


@pytest.mark.parametrize("variant", ["sequential", "parallel", "linear"])
@pytest.mark.parametrize("rule", ["none", "dwa"])
def test_nothing_is_computed_for_a_frozen_trunk(
    tiny_trunk: TrunkConfig, variant: str, rule: str
) -> None:
    """Its main prediction, but where a rule looks at it; the modules learn the same."""
    found = {}
    for frozen in (True, False):
        balance = RULES[rule]() if rule != "none" else NoBalance(DEPTH)
        switches = {"freeze_trunk": True} if frozen else {"detach": "all"}
        trained = Trained(tiny_trunk, variant, balance, **switches)
        result = trained(documents_of(5))
        found[frozen] = result
        assert ("train/loss_depth_0" in result.log_values()) == (not frozen or rule == "dwa")
    assert torch.equal(found[True].losses[1:], found[False].losses[1:])
    if rule == "none":
        assert found[True].losses[0] == 0 and found[True].plan.computed == [1, 2]
        total = sum(found[True].plan.factors[k] * found[True].losses[k] for k in (1, 2))
        assert float(found[True].loss) == pytest.approx(float(total))


def test_flops_of_targets_alone(tiny_trunk: TrunkConfig) -> None:
    trained = Trained(tiny_trunk, "parameter_free", NoBalance(DEPTH))
    trained.model.double()
    with counted_flops() as counted:
        assert trained(documents_of(5)).flops == counted.total
