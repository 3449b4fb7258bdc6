"""Learning-rate schedules, and groups of parameters with different algorithms and rates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtp_lightning.experiment.instantiate import instantiate
from mtp_lightning.mtp.sequential import SequentialConfig
from mtp_lightning.nn.config import TrunkConfig
from mtp_lightning.optim.adamw import AdamWConfig
from mtp_lightning.optim.base import LearningRates
from mtp_lightning.optim.groups import Combined, GroupedConfig
from mtp_lightning.optim.lr_schedule import LRSchedule
from tests import deepseek
from tests.integration.helpers import assert_same_weights, checkpoint, config, rows, train_here
from tests.models import build


@pytest.mark.parametrize(
    ("settings", "max_steps", "values"),
    [
        (
            {"kind": "cosine", "warmup_steps": 10, "min_ratio": 0.1},
            110,
            {0: 0.1, 4: 0.5, 9: 1, 10: 1, 35: 0.55 + 0.45 * 0.5**0.5, 60: 0.55, 110: 0.1, 500: 0.1},
        ),
        (
            {"kind": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.2, "min_ratio": 0.0},
            100,
            {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 1, 90: 0.5, 95: 0.25, 100: 0},
        ),
        ({"kind": "cosine"}, 100, {0: 1}),  # without a warm-up
        # 0.07 * 100 is one ulp more than 7 in floating point, and 0.29 * 100 one less than 29.
        ({"kind": "constant", "warmup_fraction": 0.07}, 100, {0: 1 / 7, 5: 6 / 7, 6: 1}),
        ({"kind": "constant", "warmup_fraction": 0.29}, 100, {27: 28 / 29, 28: 1}),
        ({"kind": "constant", "warmup_fraction": 0.071}, 100, {0: 1 / 8, 7: 1}),
        # A warm-up that is longer than the run.
        ({"kind": "wsd", "warmup_steps": 1000, "decay_fraction": 0.5}, 10, {0: 0.001, 9: 0.01}),
        # A constant rate needs no length.
        ({"kind": "constant", "warmup_steps": 4}, -1, {0: 0.25, 3: 1, 4: 1, 10**6: 1}),
    ],
)
def test_learning_rates_are_those_computed_by_hand(
    settings: dict, max_steps: int, values: dict[int, float]
) -> None:
    schedule = LRSchedule(**settings)
    multipliers = {step: schedule(step, max_steps) for step in values}
    assert multipliers == pytest.approx(values, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "triangle"},
        {"warmup_steps": 5, "warmup_fraction": 0.1},
        {"warmup_steps": -1},
        {"warmup_steps": 0.1},
        {"warmup_fraction": 1.5},
        {"decay_fraction": -0.1},
        {"min_ratio": float("nan")},
        {"min_ratio": "0.1"},
    ],
)
def test_wrong_settings_of_a_schedule_are_refused_with_their_values(arguments: dict) -> None:
    with pytest.raises(ValueError) as error:
        LRSchedule(**arguments)
    assert all(str(value) in str(error.value) for value in arguments.values())


SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW


def grouped(**groups: dict[str, Any]) -> GroupedConfig:
    return GroupedConfig(groups=groups, schedule=lambda step, max_steps: 1.0 - step / max_steps)


def names_in(model: nn.Module, optimizer: Combined) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}


def muon(model: nn.Module, tmp_path: Path) -> Combined:
    cfg = config(tmp_path, tmp_path, {"optimizer": "muon", "optimizer.lr": None})
    return instantiate(cfg.optimizer, kind=GroupedConfig).build(model)


def test_every_parameter_is_in_one_group_of_muon(tiny_trunk: TrunkConfig, tmp_path: Path) -> None:
    for model in (build(tiny_trunk, SequentialConfig(depth=1)), deepseek.build(deepseek.TRUNK)):
        groups = names_in(model, muon(model, tmp_path))
        parameters = dict(model.named_parameters())
        assert sorted(sum(map(list, groups.values()), [])) == sorted(parameters)
        assert all(parameters[name].dim() == 2 for name in groups["muon"])
        assert all(parameters[name].dim() == 1 for name in groups["rest"])
        assert "trunk.embedding.weight" in groups["decayed"]
        assert not any("embedding" in name for name in groups["muon"])


def test_groups_step_as_separate_optimizers_at_the_scheduled_rates(tiny_trunk: TrunkConfig) -> None:
    model, twin = (build(tiny_trunk, SequentialConfig(depth=1)) for _ in range(2))
    combined = grouped(
        heads={"parameters": r"^mtp\.", "lr": 0.1, "algorithm": partial(SGD, momentum=0.9)},
        rest={"parameters": "rest", "lr": 0.01, "algorithm": ADAMW},
    )
    optimizer = combined.build(model)
    rates = LearningRates(optimizer, combined.schedule)
    heads = [p for name, p in twin.named_parameters() if name.startswith("mtp.")]
    rest = [p for name, p in twin.named_parameters() if not name.startswith("mtp.")]
    separate = [SGD(heads, lr=0.1, momentum=0.9), ADAMW(rest, lr=0.01)]
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        logged = rates.set(step, 4)
        assert logged["train/lr_heads"] == logged["train/lr"] == 0.1 * (1 - step / 4)
        assert logged["train/lr_rest"] == 0.01 * (1 - step / 4)
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        optimizer.step()
        for algorithm, lr in zip(separate, (0.1, 0.01), strict=True):
            algorithm.param_groups[0]["lr"] = lr * (1 - step / 4)
            algorithm.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_loaded_optimizer_continues_as_before(tiny_trunk: TrunkConfig, tmp_path: Path) -> None:
    def stepped(model: nn.Module, optimizer: Combined, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    model = build(tiny_trunk, SequentialConfig(depth=1))
    optimizer = muon(model, tmp_path)
    stepped(model, optimizer, 1)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    stepped(model, optimizer, 2)
    resumed = build(tiny_trunk, SequentialConfig(depth=1))
    loaded = muon(resumed, tmp_path)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(weights)
    loaded.load_state_dict(state)
    # A schedule sets the groups that the optimizers read.
    for group in loaded.param_groups:
        assert any(group is g for o in loaded.optimizers.values() for g in o.param_groups)
    stepped(resumed, loaded, 2)
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="groups are only.*muon, decayed, rest"):
        grouped(only={"parameters": "rest", "lr": 0.1, "algorithm": SGD}).build(
            model
        ).load_state_dict(state)


def group(**changes: Any) -> dict[str, Any]:
    return {"parameters": "rest", "lr": 1, "algorithm": SGD, **changes}


TOO_FAST = partial(torch.optim.Muon, momentum=2)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": group(parameters="matrices")}, "No group of optimizer.groups takes trunk"),
        ({"a": group(lr=0)}, "optimizer.groups.a.lr .* 0"),
        ({"a": group(parameters="(")}, r"groups.a.parameters=\( is neither"),
        ({"a": group(algorithm=torch.optim.Muon)}, "groups.a.*2D"),
        ({"a": group(algorithm=partial(SGD, speed=1))}, "groups.a is refused: .*speed"),
        (
            {"a": group(parameters="no_such_layer"), "b": group()},
            "groups.a.parameters=no_such_layer takes no parameter",
        ),
        (
            {"a": group(parameters="matrices", algorithm=TOO_FAST), "b": group()},
            r"groups.a.algorithm.momentum must be a number in \[0, 1\), not 2",
        ),
    ],
)
def test_wrong_groups_are_refused(
    tiny_trunk: TrunkConfig, groups: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        grouped(**groups).build(build(tiny_trunk, SequentialConfig(depth=1)))


def test_a_beta_of_adamw_may_be_the_whole_number_0(tiny_trunk: TrunkConfig) -> None:
    schedule = LRSchedule(kind="constant")
    adamw = AdamWConfig(lr=0.1, betas=[0, 0.9], eps=1e-8, weight_decay=0.1, schedule=schedule)
    optimizer = adamw.build(build(tiny_trunk, SequentialConfig(depth=1)))
    assert optimizer.defaults["betas"] == (0.0, 0.9)


def test_adamw_decays_matrices_alone(tiny_trunk: TrunkConfig) -> None:
    """Neither vectors nor what a balance rule learns; parameters that are frozen stay."""
    model, learned = build(tiny_trunk, SequentialConfig(depth=1)), nn.Parameter(torch.ones(()))
    frozen = model.trunk.embedding.weight.requires_grad_(False)
    schedule = LRSchedule(kind="constant")
    adamw = AdamWConfig(lr=0.1, betas=[0.9, 0.9], eps=1e-8, weight_decay=0.5, schedule=schedule)
    optimizer = adamw.build(model, [learned])
    parameters = [*model.parameters(), learned]
    before = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, old in zip(parameters, before, strict=True):
        decayed = parameter.dim() == 2 and parameter is not frozen
        torch.testing.assert_close(parameter.detach(), old * 0.95 if decayed else old)


@pytest.mark.slow
def test_a_run_with_muon_resumes_exactly(tmp_path: Path, cache: Path) -> None:
    """The parameters of a balance rule, too."""
    settings = {
        "optimizer": "muon",
        "optimizer.lr": None,
        "optimizer.schedule.kind": "constant",
        "optimizer.schedule.warmup_fraction": "null",
        "lambda_schedule": "constant",
        "balance": "uncertainty",
    }
    train_here(tmp_path / "whole", cache, settings | {"trainer.max_steps": 8})
    for steps in (4, 8):
        train_here(tmp_path / "parts", cache, settings | {"trainer.max_steps": steps})
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")
    stored = [checkpoint(tmp_path / run)["balance"]["state"] for run in ("whole", "parts")]
    assert stored[0] == stored[1] != {"log_variances": [0.0] * 3}
    first, *_, last = rows(tmp_path / "whole")
    assert last["train/lr_muon"] == pytest.approx(0.02)
    assert last["train/lr_rest"] == pytest.approx(0.003)
    assert last["train/loss"] < first["train/loss"]
    assert set(checkpoint(tmp_path / "whole")["optimizer_states"][0]) == {"muon", "decayed", "rest"}
