"""``compare.match``: fewer layers or steps make runs equal in parameters or FLOPs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules.windows import WindowBatch
from mtp_lightning import matching
from mtp_lightning.command_line import check_config
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.build import apply_match
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.linear import LinearConfig
from mtp_lightning.mtp.none import NoMTPConfig
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.balance.dwa import DWA
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.balance.sampled_depths import SampledDepths
from mtp_lightning.objective.balance.trunk_ratio import TrunkRatio
from mtp_lightning.objective.cost import StepCost
from mtp_lightning.objective.schedule.base import LambdaSchedule, Progress
from mtp_lightning.objective.schedule.curriculum import forward_curriculum
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.schedule.published import constant
from mtp_lightning.objective.step import OptimizerStep
from tests import closed_forms
from tests.integration import helpers

TRUNK = TrunkConfig(vocab_size=257, d_model=32, n_layers=8, n_heads=4, n_kv_heads=2, d_ff=96)
LENGTH = matching.Length(seq_len=64, max_steps=300, tokens_per_step=1024)


def matched(
    config: ModelConfig, quantity: str, schedule: Piecewise | None = None
) -> matching.Matched:
    return matching.match(
        config,
        schedule or constant(depth=config.mtp.depth, mtp_lambda=0.3),
        LENGTH,
        match=quantity,
        reference=matching.plain_reference(config, LENGTH),
        balance=NoBalance(config.mtp.depth),
    )


@pytest.mark.parametrize("depth", [1, 3])
def test_gloeckles_heads_cost_a_trunk_layer_each(depth: int) -> None:
    result = matched(ModelConfig(trunk=TRUNK, mtp=ParallelConfig(depth=depth)), "parameters")
    assert result.n_layers == 8 - depth
    assert result.max_steps == 300
    # What remains is the heads' own norms.
    assert result.reached - result.target == depth * 32
    assert result.remaining == pytest.approx(depth * 32 / closed_forms.trunk_params(TRUNK))
    assert f"{8 - depth} trunk layers" in str(result) and "mtp=none" in str(result)


def test_the_number_of_layers_is_the_nearest_in_parameters() -> None:
    for mtp in (SequentialConfig(depth=2), LinearConfig(depth=2), LinearConfig(depth=6)):
        config = ModelConfig(trunk=TRUNK, mtp=mtp)
        result = matched(config, "parameters")
        distances = {
            n: abs(ModelConfig(trunk=replace(TRUNK, n_layers=n), mtp=mtp).num_params()
                   - closed_forms.trunk_params(TRUNK))
            for n in range(1, 9)
        }  # fmt: skip
        assert distances[result.n_layers] == min(distances.values())
    # Medusa's small heads are not worth a layer.
    few = ModelConfig(trunk=TRUNK, mtp=LinearConfig(depth=1))
    assert matched(few, "parameters").n_layers == 8


def test_a_trunk_with_too_few_layers_is_refused() -> None:
    config = ModelConfig(trunk=replace(TRUNK, n_layers=2), mtp=SequentialConfig(depth=4))
    with pytest.raises(ValueError, match="with 1 trunk layers left .* more than the reference's"):
        matched(config, "parameters")


def test_match_flops_shortens_the_run() -> None:
    config = ModelConfig(trunk=TRUNK, mtp=SequentialConfig(depth=2))
    result = matched(config, "flops")
    plain = ModelConfig(trunk=TRUNK, mtp=NoMTPConfig())
    # By hand: steps are in inverse proportion to the cost of a token.
    expected = 300 * StepCost(plain).per_token(64) / StepCost(config).per_token(64)
    assert abs(result.max_steps - expected) <= 0.5
    assert result.n_layers == 8 and result.max_steps < 300
    assert result.target == StepCost(plain).per_token(64) * 1024 * 300
    assert result.reached == StepCost(config).per_token(64) * 1024 * result.max_steps
    assert abs(result.remaining) < 1 / result.max_steps


def test_match_flops_counts_a_depth_only_while_it_is_active() -> None:
    config = ModelConfig(trunk=TRUNK, mtp=SequentialConfig(depth=2))
    growing = forward_curriculum(depth=2, mtp_lambda=0.3)  # thirds of the run with 0, 1, 2 depths
    cost = [StepCost(config).per_token(64, active) for active in ([], [1], [1, 2])]
    short = replace(LENGTH, tokens_per_step=10)
    total = matching.total_flops(StepCost(config), growing, short, NoBalance(2))
    assert total == pytest.approx(sum(cost) * 100 * 10, rel=1e-9)
    assert matched(config, "flops", growing).max_steps > matched(config, "flops").max_steps
    # Longer runs are sampled; the sum must not notice.
    longer = replace(short, max_steps=90_000)
    long = matching.total_flops(StepCost(config), growing, longer, NoBalance(2))
    assert long == pytest.approx(sum(cost) * 30_000 * 10, rel=1e-3)


@pytest.mark.parametrize(("first", "second"), [(0.0, 1.0), (1.0, 0.0)])
@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_match_flops_is_the_nearest_where_depths_begin_or_end_at_a_step(first, second, unit):
    trunk = replace(TRUNK, n_layers=2)  # two thirds of a step's cost are its depths'
    config = ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=4))
    at = 150 if unit == "steps" else 150 * LENGTH.tokens_per_step
    schedule = Piecewise(4, 0.3, {0: first, at: second}, unit=unit, interpolation="step")
    result = matched(config, "flops", schedule)
    without, with_depths = (StepCost(config).per_token(64, active) for active in ([], range(1, 5)))
    costs = {
        n: 1024 * (min(n, 150) * (with_depths if first else without)
                   + max(n - 150, 0) * (with_depths if second else without))
        for n in range(1, 600)
    }  # fmt: skip
    nearest = min(costs, key=lambda n: abs(costs[n] - result.target))
    assert result.max_steps == nearest and result.reached == pytest.approx(costs[nearest])
    for n, share in ((170, 0.25), (170, 0.75), (400, 0.25), (400, 0.75)):
        target = costs[n] + share * (costs[n + 1] - costs[n])
        steps, _ = matching.match_steps(StepCost(config), schedule, target, LENGTH, NoBalance(4))
        assert steps == n + round(share)


@pytest.mark.parametrize(
    "rule", [GradNorm(2, every_n_steps=4), TrunkRatio(2, every_n_steps=5, frozen=0.25)]
)
def test_the_flops_of_measurements_are_those_of_the_steps_that_measure(rule: Any) -> None:
    length = matching.Length(seq_len=16, max_steps=20, tokens_per_step=32)
    cost = StepCost(ModelConfig(trunk=TRUNK, mtp=SequentialConfig(depth=2)))
    measures = [rule.measures_at(Progress(step=step, max_steps=20)) for step in range(20)]
    steps = [cost.per_token(16, scope=rule.scope if measured else None) for measured in measures]
    schedule = constant(depth=2, mtp_lambda=0.3)
    total = matching.total_flops(cost, schedule, length, rule)
    assert total == pytest.approx(32 * sum(steps), rel=1e-9)


def test_the_flops_of_sampled_depths_are_weighted_by_their_probabilities() -> None:
    length = matching.Length(seq_len=16, max_steps=20, tokens_per_step=32)
    cost = StepCost(ModelConfig(trunk=TRUNK, mtp=SequentialConfig(depth=2)))
    rule, schedule = SampledDepths(2, seed=0, probabilities=[1, 3]), constant(2, 0.3)
    total = matching.total_flops(cost, schedule, length, rule)
    mean = (cost.per_token(16, [1]) + 3 * cost.per_token(16, [2])) / 4
    assert total == pytest.approx(20 * 32 * mean, rel=1e-9)


@pytest.mark.parametrize(("rule", "stored"), [(DWA, False), (NoBalance, True), (NoBalance, False)])
def test_the_flops_of_a_frozen_trunk_are_those_of_its_steps(rule: Any, stored: bool) -> None:
    trunk = replace(TRUNK, n_layers=2)
    config = ModelConfig(trunk=trunk, mtp=SequentialConfig(depth=1, freeze_trunk=True))
    model, schedule, balance = MTPModel(config), constant(depth=1, mtp_lambda=0.3), rule(1)
    model.initialize(0)
    step = OptimizerStep(model, schedule=schedule, balance=balance)
    states = torch.randn(2, 1, 16, trunk.d_model) if stored else None
    batch = WindowBatch(torch.randint(trunk.vocab_size, (2, 18)), 1, states=states)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    done = step(batch, Progress(step=0, max_steps=3), torch.optim.SGD(weights, lr=0.0))
    length = matching.Length(seq_len=16, max_steps=3, tokens_per_step=32, stored_states=stored)
    assert matching.total_flops(StepCost(config), schedule, length, balance) == 3 * done.flops


def test_wrong_settings_and_references_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compare.match=time is unknown"):
        check_config.check({"compare": {"match": "time", "reference": None}}, "config")
    with pytest.raises(ValueError, match="compare.reference=runs/a is used by nothing"):
        check_config.check({"compare": {"match": "none", "reference": "runs/a"}}, "config")
    with pytest.raises(FileNotFoundError, match="holds no summary.json"):
        matching.run_reference(tmp_path)
    for cost in ({}, {"flops": 0}, {"flops": float("nan")}, {"flops": -1e9}):
        (tmp_path / "summary.json").write_text(json.dumps({"parameters": 3, **cost}))
        with pytest.raises(ValueError, match="(?i)does not say what its run cost .*flops"):
            matching.run_reference(tmp_path)


@pytest.mark.parametrize(
    "change", [{**helpers.TASK, "data.seq_len": 32}, {"data.document_mask": True}]
)
def test_a_depth_that_ends_at_a_token_is_refused_where_not_every_position_is_one(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    """The FLOPs count positions; the schedule counts their targets, which are fewer."""
    ends = {"lambda_schedule": "knots", "lambda_schedule.knots": {0: 1, 64: 0}}
    ends |= {"lambda_schedule.unit": "tokens", "compare.match": "flops"}
    with pytest.raises(UserError, match="set lambda_schedule.unit=steps"):
        apply_match(helpers.config(tmp_path, tmp_path, {**ends, **change}), 260)
    never = [
        {**change, "lambda_schedule.knots": {0: 1, end: by}} for end, by in ((64, 0.5), (9e9, 0))
    ]
    for fits in ({}, *never):
        assert apply_match(helpers.config(tmp_path, tmp_path, {**ends, **fits}), 260)[1]


class UntilToken(LambdaSchedule):
    """A user's schedule, which ends at a number of tokens that no key of its config names."""

    def lambdas(self, progress: Progress) -> list[float]:
        return [0.3 if progress.tokens < 64 else 0.0]


def test_a_users_schedule_that_ends_at_a_token_is_refused_like_ours(tmp_path: Path) -> None:
    cfg = helpers.config(tmp_path, tmp_path, {"compare.match": "flops", "mtp.depth": 1})
    cfg.lambda_schedule = {"_target_": f"{__name__}.UntilToken", "depth": 1}
    assert apply_match(cfg, 260)[1]
    cfg.data.document_mask = True
    with pytest.raises(UserError, match="set lambda_schedule.unit=steps"):
        apply_match(cfg, 260)


def test_a_matched_run_is_built_trained_and_reported_as_matched(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    settings = {"model.n_layers": 3}
    plain = helpers.train_here(
        tmp_path / "plain", cache, {**settings, "mtp": "none", "mtp.depth": 0}
    )

    fewer = {**settings, "mtp": "parallel", "mtp.depth": 1, "compare.match": "parameters"}
    first = helpers.train_here(tmp_path / "layers", cache, fewer)
    stored = helpers.checkpoint(tmp_path / "layers")
    assert stored["model_config"]["trunk"]["n_layers"] == 2
    assert stored["config"]["model"]["n_layers"] == 3, "the config keeps the typed value"
    assert first["parameters"] - plain["parameters"] == 32
    assert first["compare"]["n_layers"] == 2
    again = helpers.train_here(tmp_path / "layers", cache, {**fewer, "trainer.max_steps": 12})
    assert again["step"] == 12, "a matched run can be continued"

    shorter = {**settings, "compare.match": "flops", "compare.reference": tmp_path / "plain"}
    second = helpers.train_here(tmp_path / "flops", cache, shorter)
    assert second["step"] == second["compare"]["max_steps"] < 10
    assert second["flops"] == second["compare"]["reached"]
    half_a_step = 0.51 * second["flops"] / second["step"]
    assert abs(second["flops"] - plain["flops"]) <= half_a_step
