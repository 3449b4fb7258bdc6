"""The gradients of the depths' losses that balance rules read, against autograd in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.base import MTPConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.balance.base import NoBalance
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.gradients import (
    Scope,
    TaskGradients,
    require_measurable,
    shared_parameters,
    task_gradients,
)
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.cost import StepCost, counted_flops
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import PositionCounts, StepPlan, step_counts
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from tests.losses import mtp_loss, reported_loss, step_of
from tests.models import build, windows
from tests.mtp.summaries import ahead_windows

KEY = RandomKey(seed=7, step=3)


def plan_of(
    micro_batches: list[WindowBatch], counts: PositionCounts | Sequence[int] | None = None
) -> StepPlan:
    """A step over micro-batches that have the random keys of training."""
    if counts is None:
        counts = sum(micro.counts() for micro in micro_batches).tolist()
    if not isinstance(counts, PositionCounts):
        counts = PositionCounts(counts)
    factors = [1.0] * len(counts.valid)
    rows = [sum(map(len, micro_batches[:i])) for i in range(len(micro_batches))]
    return StepPlan(
        base=factors,
        factors=factors,
        counts=counts,
        windows=sum(map(len, micro_batches)),
        micro_batches=[
            replace(micro, key=replace(KEY, first_row=row))
            for micro, row in zip(micro_batches, rows, strict=True)
        ],
    )


EXPERTS = ExpertsConfig(n_routed=4, n_shared=1, top_k=2, d_expert=16, sequence_loss=0.5)

MODELS = {
    "sequential": ("sequential", {}, {}),
    "pre": ("sequential", {"input_norm": "pre", "branch": "before_last"}, {"tie_embeddings": True}),
    "mixing": ("sequential", {"hidden_state_mixing": True, "share_layers": True}, {}),
    "parallel": ("parallel", {}, {}),
    "linear": ("linear", {}, {"tie_embeddings": True}),
    "parameter_free": ("parameter_free", {}, {}),
    "experts": ("sequential", {}, {"feed_forward": EXPERTS, "recompute": True}),
}


def make(trunk: TrunkConfig, name: str) -> MTPModel:
    variant, switches, changes = MODELS[name]
    model = build(replace(trunk, **changes), variant, depth=3, **switches)
    return model.double()


def brute_force(
    model: MTPModel, batch: WindowBatch, k: int, parameters: list[nn.Parameter]
) -> list[Tensor]:
    hidden = model(replace(batch, key=KEY))[k]
    logits = (hidden @ model.head.weight.detach().T).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.targets(k).flatten(), ignore_index=-100)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_autograd_on_the_whole_graph(
    tiny_trunk: TrunkConfig, name: str
) -> None:
    model, batch = make(tiny_trunk, name), windows(4, 10, 3, borders=0.15)
    groups = {
        "trunk": shared_parameters(model, "trunk"),
        "last_block": shared_parameters(model, "last_block"),
        "embedding": [model.trunk.embedding.weight],
    }
    plan = plan_of(batch.micro_batches(3), batch.counts().tolist())
    measured = task_gradients(model, CROSS_ENTROPY, plan, [1, 3], groups)
    for group, parameters in groups.items():
        assert list(measured[group].vectors) == [0, 1, 3]
        for k, vector in measured[group].vectors.items():
            expected = [g.flatten() for g in brute_force(model, batch, k, parameters)]
            assert any(e.any() for e in expected)
            torch.testing.assert_close(vector, torch.cat(expected), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["mixing", "parallel", "experts"])
def test_measuring_gradients_changes_nothing_for_training(
    tiny_trunk: TrunkConfig, name: str
) -> None:
    model, batch = make(tiny_trunk, name), windows(4, 10, 3, borders=0.15)
    counts, weights = batch.counts().tolist(), [0.3, 0.2, 0.1]

    def train() -> tuple[dict[str, Tensor], list[Tensor]]:
        model.zero_grad(set_to_none=True)
        loss, _, reported = reported_loss(model, batch, weights, counts, key=KEY)
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return grads, list(reported.loads.values())

    before, loads = train()
    loads_before = [load.clone() for load in loads]
    state = torch.get_rng_state()
    group = {"trunk": shared_parameters(model, "trunk")}
    task_gradients(model, CROSS_ENTROPY, plan_of([batch], counts), [1, 2, 3], group)
    assert torch.equal(state, torch.get_rng_state())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in before)
        assert p.grad is None or torch.equal(p.grad, before[n])
    assert all(torch.equal(*pair) for pair in zip(loads, loads_before, strict=True))


@pytest.mark.parametrize("variant", ["sequential", "parallel", "parameter_free"])
def test_gradients_include_those_of_the_confidence_loss(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    model = build(tiny_trunk, variant, depth=3, confidence=True).double()
    batch, weights = windows(4, 10, 3), [0.3, 0.2, 0.1]
    step = step_of(model, Objective(term=CrossEntropy(), confidence=True))
    counts = step_counts(model.mtp, batch)
    mtp_loss(model, batch, weights, counts.valid, term=step.objective)[0].backward()
    group = {"": shared_parameters(model, "trunk")}
    plan = plan_of([batch], counts)
    measured = task_gradients(model, step.objective, plan, [1, 2, 3], group)[""]
    for k, factor in enumerate([1.0, *weights]):
        measured.subtract(k, factor)
    assert all(p.grad is not None and p.grad.abs().max() < 1e-7 for p in measured.parameters)


def test_shared_parameters_are_those_that_depths_reach(tiny_trunk: TrunkConfig) -> None:
    def names(variant: str, scope: str, **switches: str) -> set[str]:
        model = build(tiny_trunk, variant, depth=1, **switches)
        chosen = {id(p) for p in shared_parameters(model, scope)}  # type: ignore[arg-type]
        shared = [n for n, p in model.named_parameters() if id(p) in chosen]
        return {".".join(n.split(".")[:3]) for n in shared}

    first, last, norm = "trunk.blocks.0", "trunk.blocks.1", "trunk.norm.weight"
    assert names("sequential", "trunk") == {first, last, norm}
    assert names("sequential", "trunk", input_norm="pre") == {first, last}
    assert names("sequential", "last_block") == {last}
    assert names("parallel", "trunk") == {first}
    assert names("parallel", "last_block") == {first}
    assert names("linear", "trunk", branch="before_last") == {first, norm}
    assert names("parameter_free", "trunk") == {first, last, norm}


def test_norms_and_cosines_of_gradients_and_their_tags() -> None:
    vectors = {0: [3.0, 4.0, 0.0], 1: [0.0, -2.0, 0.0], 2: [0.0, 0.0, 0.0]}
    gradients = TaskGradients({k: torch.tensor(v) for k, v in vectors.items()}, [])
    assert gradients.norms == {0: 5.0, 1: 2.0, 2: 0.0}
    assert gradients.cosines == {1: pytest.approx(-0.8), 2: 0.0}
    assert gradients.log_values("last_block").keys() == {
        *(f"grad/norm_depth_{k}" for k in range(3)),
        *(f"grad/cosine_depth_{k}" for k in (1, 2)),
    }
    assert "grad/embedding_norm_depth_0" in gradients.log_values("embedding")


@pytest.mark.parametrize(
    ("variant", "switches", "layers", "message"),
    [
        ("sequential", {"freeze_trunk": True}, 2, "mtp.freeze_trunk=true"),
        ("linear", {"detach": "all"}, 2, "mtp.detach=all"),
        ("sequential", {"detach": "trunk"}, 2, "mtp.detach=trunk"),
        ("parallel", {}, 1, "model.n_layers=1"),
    ],
)
def test_measuring_rules_are_refused_if_no_depth_reaches_the_trunk(
    tiny_trunk: TrunkConfig, variant: str, switches: dict, layers: int, message: str
) -> None:
    trunk = replace(tiny_trunk, n_layers=layers)
    config = ModelConfig(trunk=trunk, mtp=MTPConfig.find(variant)(depth=1, **switches))
    with pytest.raises(ValueError, match=f"balance=gradnorm measures .*{message}"):
        require_measurable(config, CROSS_ENTROPY, setting="balance=gradnorm")


@pytest.mark.parametrize(
    ("variant", "branch", "scope"),
    [
        ("sequential", "final", "last_block"),
        ("sequential", "before_last", "trunk"),
        ("parallel selector", "final", "trunk"),
        ("linear mlp", "final", "trunk"),
        ("parameter_free", "final", "trunk"),
        ("joint", "final", "trunk"),
    ],
)
def test_flops_of_measuring_are_those_of_pytorchs_operators(
    tiny_trunk: TrunkConfig, variant: str, branch: str, scope: Scope
) -> None:
    """Also those of experts, which have an autograd node of this project."""
    switches = {} if variant == "parameter_free" else {"branch": branch}
    variant, _, correction = variant.partition(" ")
    switches |= {"correction": correction} if correction else {}
    experts = replace(tiny_trunk, feed_forward=replace(EXPERTS, sequence_loss=0.0))
    for trunk in (tiny_trunk, experts) if variant == "sequential" else (tiny_trunk,):
        model = build(trunk, variant, depth=3, **switches).double()
        batch = windows(4, 10, 3)
        group = {"": shared_parameters(model, scope)}
        objective = CROSS_ENTROPY.for_model(model)
        cost = StepCost(model.config)
        for active in ([1, 2, 3], [2]) if trunk is experts else ([1, 3],):
            with counted_flops() as counted:
                task_gradients(model, objective, plan_of([batch]), active, group)
            expected = cost(batch.seq_len, active, scope=scope) - cost(batch.seq_len, active)
            assert counted.total == len(batch) * expected


@pytest.mark.parametrize("name", ["top", "bag", "registers"])
def test_heads_without_token_predictions_are_measured(tiny_trunk: TrunkConfig, name: str) -> None:
    """``g_0 + lambda g_1`` is the gradient that training accumulates on the trunk, and the FLOPs of
    the measurement are counted."""
    trunk = replace(tiny_trunk, tie_embeddings=False)
    model = build(trunk, name, lookahead=6).double()
    options: dict[str, Any] = {"schedule": Piecewise(1, 0.3), "accumulate": 2}
    step = OptimizerStep(model, balance=NoBalance(1), **options)
    batch = ahead_windows(4, 12, 6, documents=True, scored=True)
    begin = Progress(step=0, max_steps=10, tokens=0)
    plan = step.plan(batch, begin)
    parameters = list(model.trunk.blocks.parameters())
    groups = {"trunk": parameters}
    (measured,) = task_gradients(model, step.objective, plan, [1], groups).values()
    for micro in plan.micro_batches:
        loss, _, _ = step.loss(plan, micro)
        loss.backward()
    accumulated = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(accumulated, measured.vectors[0] + 0.3 * measured.vectors[1])
    assert measured.norms[1] > 1e-6

    balance = CosineGate(1) if name == "top" else GradNorm(1)
    with counted_flops() as counted:
        result = OptimizerStep(model, balance=balance, **options)(
            batch, begin, torch.optim.SGD(model.parameters(), lr=0.1)
        )
    tags = [tag for tag in result.values if tag.startswith("grad/")]
    assert tags and all(float(result.values[tag]) == float(result.values[tag]) for tag in tags)
    assert result.flops == counted.total
