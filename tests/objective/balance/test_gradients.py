"""The gradients of the depths' losses that balance rules read, against autograd in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules.windows import RandomKey, WindowBatch
from mtp_lightning.model import MTPModel
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.nn.moe import ExpertsConfig
from mtp_lightning.objective.balance.cosine_gate import CosineGate
from mtp_lightning.objective.balance.gradients import (
    Scope,
    TaskGradients,
    shared_parameters,
    task_gradients,
)
from mtp_lightning.objective.balance.gradnorm import GradNorm
from mtp_lightning.objective.cost import StepCost, counted_flops
from mtp_lightning.objective.micro_batch import micro_batch_loss
from mtp_lightning.objective.objective import CROSS_ENTROPY, Objective
from mtp_lightning.objective.plan import StepPlan
from mtp_lightning.objective.schedule.base import Progress
from mtp_lightning.objective.schedule.piecewise import Piecewise
from mtp_lightning.objective.step import OptimizerStep
from mtp_lightning.objective.terms.cross_entropy import CrossEntropy
from tests.losses import mtp_loss, reported_loss, step_of
from tests.models import build, target_counts, windows
from tests.mtp.summaries import ahead_windows

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


def make(trunk: TrunkConfig, name: str) -> tuple[MTPModel, WindowBatch]:
    """A model, and windows with the random key of a step."""
    variant, switches, changes = MODELS[name]
    model = build(replace(trunk, **changes), variant, depth=3, **switches)
    return model.double(), replace(windows(4, 10, 3, borders=0.15), key=RandomKey(seed=0, step=0))


def plan_of(model: MTPModel, batch: WindowBatch, objective: Objective, parts: int = 1) -> StepPlan:
    """The first step of training, in micro-batches."""
    step = step_of(model, objective, accumulate=parts)
    return step.plan(batch, Progress(step=0, max_steps=10))


def brute_force(
    model: MTPModel, batch: WindowBatch, k: int, parameters: list[nn.Parameter]
) -> list[Tensor]:
    logits = (model(batch)[k] @ model.head.weight.detach().T).flatten(0, 1)
    loss = F.cross_entropy(logits, batch.targets(k).flatten(), ignore_index=-100)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_equal_those_of_autograd_on_the_whole_graph(
    tiny_trunk: TrunkConfig, name: str
) -> None:
    model, batch = make(tiny_trunk, name)
    groups = {
        "trunk": shared_parameters(model, "trunk"),
        "last_block": shared_parameters(model, "last_block"),
        "embedding": [model.trunk.embedding.weight],
    }
    plan = plan_of(model, batch, CROSS_ENTROPY, parts=2)
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
    model, batch = make(tiny_trunk, name)
    loss, _, reported = reported_loss(model, batch, [0.3] * 3, target_counts(batch).tolist())
    loss.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    loads = [load.clone() for load in reported.loads.values()]
    state = torch.get_rng_state()
    group = {"trunk": shared_parameters(model, "trunk")}
    plan = plan_of(model, batch, CROSS_ENTROPY)
    task_gradients(model, CROSS_ENTROPY, plan, [1, 2, 3], group)
    assert torch.equal(state, torch.get_rng_state())
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.requires_grad
        assert p.grad is grad is None or torch.equal(p.grad, grad)
    assert all(map(torch.equal, reported.loads.values(), loads))


@pytest.mark.parametrize("variant", ["sequential", "parallel", "parameter_free"])
def test_gradients_include_those_of_the_confidence_loss(
    tiny_trunk: TrunkConfig, variant: str
) -> None:
    model = build(tiny_trunk, variant, depth=3, confidence=True).double()
    batch, weights = windows(4, 10, 3), [0.3, 0.2, 0.1]
    objective = Objective(term=CrossEntropy(), confidence=True).for_model(model)
    mtp_loss(model, batch, weights, target_counts(batch).tolist(), term=objective)[0].backward()
    group = {"": shared_parameters(model, "trunk")}
    plan = plan_of(model, batch, objective)
    measured = task_gradients(model, objective, plan, [1, 2, 3], group)[""]
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
        cost, plan = StepCost(model.config), plan_of(model, batch, objective)
        for active in ([1, 2, 3], [2]) if trunk is experts else ([1, 3],):
            with counted_flops() as counted:
                task_gradients(model, objective, plan, active, group)
            expected = cost(batch.seq_len, active, scope=scope) - cost(batch.seq_len, active)
            assert counted.total == len(batch) * expected


@pytest.mark.parametrize("name", ["top", "bag", "registers"])
def test_heads_without_token_predictions_are_measured(tiny_trunk: TrunkConfig, name: str) -> None:
    """``g_0 + lambda g_1`` is the gradient that training accumulates on the trunk, and the FLOPs of
    the measurement are counted."""
    trunk = replace(tiny_trunk, tie_embeddings=False)
    model = build(trunk, name, lookahead=6).double()
    batch = ahead_windows(4, 12, 6, documents=True, scored=True)
    balance, schedule = CosineGate(1) if name == "top" else GradNorm(1), Piecewise(1, 0.3)
    step = OptimizerStep(model, balance=balance, schedule=schedule, accumulate=2)
    plan = step.plan(batch, Progress(step=0, max_steps=10))
    parameters = list(model.trunk.blocks.parameters())
    groups = {"trunk": parameters}
    (measured,) = task_gradients(model, step.objective, plan, [1], groups).values()
    for micro in plan.micro_batches:
        loss, _, _ = micro_batch_loss(model, step.objective, plan, micro)
        loss.backward()
    accumulated = torch.cat([p.grad.flatten() for p in parameters])
    torch.testing.assert_close(accumulated, measured.vectors[0] + 0.3 * measured.vectors[1])
    assert measured.norms[1] > 1e-6
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with counted_flops() as counted:
        result = step(batch, Progress(step=0, max_steps=10), optimizer)
    measures = [float(value) for tag, value in result.values.items() if tag.startswith("grad/")]
    assert measures and all(map(math.isfinite, measures))
    assert result.flops == counted.total
