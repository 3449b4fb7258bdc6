"""The biases that balance experts: how far and when they move, and the balance that they reach;
the sequence-wise balance loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_modules.windows import WindowBatch
from mtp_lightning.model import ModelConfig, MTPModel
from mtp_lightning.mtp.parallel import ParallelConfig
from mtp_lightning.nn.auxiliary import AuxiliaryOutputs
from mtp_lightning.nn.moe import ExpertsConfig, MoE, Router, routers_of
from mtp_lightning.objective.expert_balance import balance_experts, label
from mtp_lightning.objective.terms.e2e_tv import E2ETV
from mtp_lightning.objective.terms.kl import KL
from tests import deepseek
from tests.integration.helpers import checkpoint, command, execute, rows, train_here, weights
from tests.losses import gradients, mtp_loss, reported_loss

GAMMA = 0.001

# A quick run of a DeepSeek trunk; layer 0 is dense.
RUN: dict[str, Any] = {
    "model": "deepseek_nano",
    "model.n_layers": 2,
    "model.n_kv_heads": None,
    "model.attention.kv_rank": 12,
    "model.attention.d_nope": 8,
    "model.attention.d_rope": 4,
    "model.attention.d_value": 8,
    "model.feed_forward.n_routed": 6,
    "model.feed_forward.d_expert": 16,
    "model.feed_forward.bias_frozen": 0,
    "mtp.depth": 1,
    "trainer.max_steps": 3,
    "trainer.val_check_interval": 2,
    "callbacks.checkpoints.every_n_steps": 1,
}


def biases(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in state.items() if name.endswith("expert_bias")}


def moves(bias: Tensor) -> Tensor:
    """Biases in units of gamma."""
    return bias.double() / GAMMA


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    folder = tmp_path_factory.mktemp("run_folder")
    train_here(folder, cache, RUN | {"data.batch_size": 8})
    return folder


def test_a_run_moves_and_logs_the_biases_of_trunk_and_modules(run_folder: Path) -> None:
    trained = biases(weights(run_folder))
    assert len(trained) == 2 and any(".mtp." in name for name in trained)
    for name, bias in trained.items():
        steps = moves(bias)
        # Each of the three steps adds -1, 0 or 1; the validation between them adds nothing.
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3, msg=name)
        assert 0 < steps.abs().max() <= 3.001
    for row in rows(run_folder):
        violations = [row["moe/max_violation_layer_1"], row["moe/max_violation_depth_1"]]
        assert row["moe/max_violation"] == pytest.approx(sum(violations) / 2)
        assert min(violations) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"data.batch_size": 2, "trainer.accumulate_grad_batches": 4},
        {"data.batch_size": 8, "model.recompute": "true"},
    ],
    ids=["accumulation", "recomputation"],
)
def test_biases_do_not_depend_on_accumulation_or_recomputation(
    tmp_path: Path, cache: Path, run_folder: Path, change: dict
) -> None:
    train_here(tmp_path, cache, RUN | change)
    assert_same_biases(tmp_path, run_folder)


@pytest.mark.slow
def test_two_ranks_move_biases_as_one_process(
    tmp_path: Path, cache: Path, run_folder: Path
) -> None:
    settings = RUN | {"data.batch_size": 4, "trainer.devices": 2, "trainer.strategy": "ddp"}
    done = execute(command(tmp_path, cache, settings))
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_biases(tmp_path, run_folder)


def assert_same_biases(folder: Path, other: Path) -> None:
    a, b = biases(weights(folder)), biases(weights(other))
    assert a.keys() == b.keys() and len(a) == 2
    for name in a:
        assert torch.equal(a[name], b[name]), name
    x, y = rows(folder)[-1], rows(other)[-1]
    assert x["moe/max_violation"] == pytest.approx(y["moe/max_violation"], rel=1e-5)
    assert x["train/loss"] == pytest.approx(y["train/loss"], rel=1e-4)


@pytest.mark.slow
def test_a_resumed_run_has_the_biases_of_one_run(tmp_path: Path, cache: Path) -> None:
    common = RUN | {"trainer.val_check_interval": 1, "data.batch_size": 4}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_here(whole, cache, common | {"trainer.max_steps": 4})
    train_here(parts, cache, common | {"trainer.max_steps": 2})
    half = biases(weights(parts))
    # Recomputation may be switched on when the run is resumed.
    recompute = {"model.recompute": "true"}
    train_here(parts, cache, common | recompute | {"trainer.max_steps": 4})
    resumed = biases(weights(parts))
    for name, bias in biases(weights(whole)).items():
        assert torch.equal(bias, resumed[name])
        assert not torch.equal(bias, half[name])
    assert checkpoint(parts)["global_step"] == 4


def test_an_update_of_biases_equals_one_by_hand() -> None:
    experts = {"n_routed": 4, "n_groups": 1, "top_groups": 1, "bias_frozen": 0.2}
    config = deepseek.trunk(experts=experts)
    router = Router(32, config.feed_forward)
    auxiliary = AuxiliaryOutputs()
    auxiliary.loads[router] = torch.tensor([5, 3, 4, 4])
    values = balance_experts(router, auxiliary, fraction=0.0)
    assert router.expert_bias.tolist() == pytest.approx([-GAMMA, GAMMA, 0, 0])
    assert values["moe/max_violation"].item() == pytest.approx(0.25)
    # An unused router keeps its biases, and so do all routers at the end of the run.
    assert balance_experts(router, AuxiliaryOutputs(), fraction=0.0) == {}
    assert balance_experts(router, auxiliary, fraction=0.9).keys() == values.keys()
    assert router.expert_bias.tolist() == pytest.approx([-GAMMA, GAMMA, 0, 0])


def test_every_router_of_a_module_of_several_blocks_is_logged() -> None:
    model = deepseek.build(deepseek.TRUNK, depth=1, blocks=2).train()
    batch = WindowBatch(torch.randint(0, 37, (2, 18)), 1)
    _, _, auxiliary = reported_loss(model, batch, [0.3], [32] * 2)
    tags = balance_experts(model, auxiliary, fraction=0.0).keys() - {"moe/max_violation"}
    assert len(tags) == len(routers_of(model))
    assert {"moe/max_violation_depth_1_block_0", "moe/max_violation_depth_1"} <= tags


def test_routers_of_several_lists_of_a_stack_have_labels_of_their_own() -> None:
    names = ["depths.0", "depths.0.before.0", "others.0", "depths.1", "others.1"]
    labels = [label(f"mtp.{name}.router") for name in names]
    depths = ["depth_1", "depth_1_block_0", "mtp_others_0_router", "depth_2", "mtp_others_1_router"]
    assert labels == depths


def test_every_router_of_a_depth_of_ones_own_is_logged() -> None:
    config = ExpertsConfig(n_routed=4, n_shared=0, top_k=1, d_expert=4)
    depth = nn.ModuleDict({name: Router(8, config) for name in ("one", "two")})
    model = nn.ModuleDict({"mtp": nn.ModuleDict({"depths": nn.ModuleList([depth])})})
    auxiliary = AuxiliaryOutputs()
    auxiliary.loads[depth["one"]] = torch.tensor([4, 0, 0, 0])
    auxiliary.loads[depth["two"]] = torch.tensor([2, 0, 2, 0])
    values = balance_experts(model, auxiliary, fraction=0.0)
    assert {tag: float(value) for tag, value in values.items()} == {
        "moe/max_violation_depth_1": 3,
        "moe/max_violation_mtp_depths_0_two": 1,
        "moe/max_violation": 2,
    }


def test_a_prepass_counts_no_loads() -> None:
    """It runs heads side by side a second time."""
    model = MTPModel(ModelConfig(trunk=deepseek.TRUNK, mtp=ParallelConfig(depth=1)))
    model.initialize(0)
    batch = WindowBatch(torch.randint(0, 37, (2, 18)), 1)
    for term in (KL(), E2ETV()):
        _, _, auxiliary = reported_loss(model.train(), batch, [0.3], [32] * 2, term=term)
        assert [int(load.sum()) for load in auxiliary.loads.values()] == [2 * 16 * 2] * 3


def test_a_depth_of_weight_zero_keeps_its_biases() -> None:
    model = deepseek.build(deepseek.TRUNK, depth=2).train()
    before = {name: r.expert_bias.clone() for name, r in routers_of(model).items()}
    batch = WindowBatch(torch.randint(0, 37, (2, 19)), 2)
    _, _, auxiliary = reported_loss(model, batch, [0.3, 0.0], [32] * 3)
    values = balance_experts(model, auxiliary, fraction=0.0)
    assert "moe/max_violation_depth_1" in values and "moe/max_violation_depth_2" not in values
    for name, router in routers_of(model).items():
        assert torch.equal(router.expert_bias, before[name]) == (".depths.1." in name)


def train_router(rate: float) -> float:
    """MaxVio at the end of a stream whose tokens prefer two experts."""
    torch.manual_seed(0)
    config = deepseek.trunk(
        experts={"n_routed": 8, "n_groups": 1, "top_groups": 1, "bias_rate": rate}
    )
    layer = MoE(config.d_model, config.feed_forward).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.1)
        layer.router.weight[:2, 0] += 1.0  # tokens all have a large first feature
    violations = []
    for _ in range(300):
        x = torch.randn(1, 256, 32)
        x[..., 0] += 3.0
        auxiliary = AuxiliaryOutputs()
        layer.router(x[0], auxiliary)
        values = balance_experts(layer, auxiliary, fraction=0.0)
        violations.append(values["moe/max_violation"].item())
    return sum(violations[-20:]) / 20


def test_biases_balance_the_experts_of_a_skewed_stream() -> None:
    assert train_router(0.0) > 1.0
    assert train_router(GAMMA) < 0.5


@pytest.mark.parametrize(("head", "recompute"), [("sequential", True), ("parallel", False)])
def test_the_sequence_loss_is_a_mean_over_the_step(head: str, recompute: bool) -> None:
    """Two micro-batches give the gradient of one batch, also for the experts of heads."""
    config = deepseek.trunk(experts={"sequence_loss": 0.5}, recompute=recompute)

    def gradients_of(parts: int, config: Any = config) -> dict[str, Tensor]:
        if head == "sequential":
            model = deepseek.build(config, depth=1)
        else:
            model = MTPModel(ModelConfig(trunk=config, mtp=ParallelConfig(depth=1)))
            model.initialize(0)
        model.double().train()
        tokens = torch.randint(0, 37, (4, 18), generator=torch.Generator().manual_seed(0))
        for micro in WindowBatch(tokens, 1).micro_batches(parts):
            mtp_loss(model, micro, [0.3], [64, 64], windows=4)[0].backward()
        return gradients(model)

    whole, halves = gradients_of(1), gradients_of(2)
    without = gradients_of(1, deepseek.trunk(experts={"sequence_loss": 0.0}))
    assert whole.keys() == halves.keys() == without.keys()
    for name in whole:
        torch.testing.assert_close(whole[name], halves[name], rtol=1e-9, atol=1e-12)
    routers: Sequence[str] = [name for name in whole if "router" in name]
    assert len(routers) == 3
    for name in routers:
        assert not torch.allclose(whole[name], without[name], rtol=1e-2), name


@pytest.mark.slow
def test_the_sequence_loss_is_logged_if_it_is_on(tmp_path: Path, cache: Path) -> None:
    """One layer of the trunk and one head have experts; each adds 1e-4 at perfect balance."""
    on = RUN | {"mtp": "parallel", "model.feed_forward.sequence_loss": 1e-4}
    train_here(tmp_path / "whole", cache, on | {"data.batch_size": 8})
    losses = [row["moe/sequence_loss"] for row in rows(tmp_path / "whole")]
    assert len(losses) == 3 and losses == pytest.approx([2e-4] * 3, rel=0.1)
    split = {"data.batch_size": 2, "trainer.accumulate_grad_batches": 4}
    train_here(tmp_path / "split", cache, on | split)
    split_losses = [row["moe/sequence_loss"] for row in rows(tmp_path / "split")]
    assert split_losses == pytest.approx(losses, rel=1e-3)
    train_here(tmp_path / "off", cache, on | {"model.feed_forward.sequence_loss": 0})
    assert all("moe/sequence_loss" not in row for row in rows(tmp_path / "off"))
