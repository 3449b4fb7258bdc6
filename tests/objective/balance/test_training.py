"""The rules in real runs: what they change, what they must not, and that nothing depends on how a
step is split or on where a run was interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.helpers import (
    assert_same_weights,
    checkpoint,
    column,
    command,
    config,
    execute,
    rows,
    train_here,
    weights,
)
from tests.integration.several import run_all

RULES = [
    "dwa",
    "uncertainty",
    "gradnorm",
    "cosine_gate",
    "trunk_ratio",
    "random",
    "sampled_depths",
]
# Settings under which ten steps are enough to see a rule at work.
QUICKLY: dict[str, dict[str, Any]] = {
    "dwa": {"balance.window_steps": 2},
    "gradnorm": {"balance.every_n_steps": 2},
    "trunk_ratio": {
        "balance.every_n_steps": 2,
        "balance.rate": 0.1,
        "balance.frozen": 0.1,
    },
    "sampled_depths": {"balance.probabilities": "loss_ratio"},
}
MEASURING = ["gradnorm", "cosine_gate", "trunk_ratio"]
# Rules and heads whose steps are split in the fast tests; the slow ones take all.
FAST = [
    ("dwa", "parallel"),
    ("uncertainty", "sequential"),
    ("gradnorm", "sequential"),
    ("cosine_gate", "parallel"),
    ("trunk_ratio", "sequential"),
    ("sampled_depths", "parallel"),
]


def settings(rule: str) -> dict[str, Any]:
    return {"balance": rule, "lambda_schedule": "constant", **QUICKLY.get(rule, {})}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """The run with fixed weights."""
    folder = tmp_path_factory.mktemp("fixed")
    train_here(folder, cache, {"lambda_schedule": "constant"})
    return folder


def continue_from_the_middle(whole: Path, folder: Path) -> None:
    """``folder`` as ``whole`` was when half of its steps were done."""
    (folder / "checkpoints").mkdir(parents=True)
    middle = whole / "checkpoints" / "previous.ckpt"
    assert checkpoint(whole, "previous.ckpt")["global_step"] == 5
    shutil.copyfile(middle, folder / "checkpoints" / "last.ckpt")
    shutil.copyfile(whole / "metrics.csv", folder / "metrics.csv")


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_same_run(tmp_path: Path, cache: Path, fixed: Path, rule: str) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    chosen = settings(rule) | {"callbacks.checkpoints.every_n_steps": 5}
    train_here(whole, cache, chosen)
    found = rows(whole)
    # The rule was at work: the run is another than with fixed weights.
    assert (
        found != rows(fixed) and column(whole, "train/loss")[10] != column(fixed, "train/loss")[10]
    )
    for row in found:
        factors = [row.get("balance/main_factor", 1.0)]
        factors += [row[f"train/lambda_depth_{k}"] for k in (1, 2)]
        losses = [row.get(f"train/loss_depth_{k}", 0.0) for k in range(3)]
        total = sum(f * x for f, x in zip(factors, losses, strict=True))
        assert row["train/loss"] == pytest.approx(total, rel=1e-6)
        for k in (1, 2):  # what was not computed is not in the log
            assert (f"train/loss_depth_{k}" in row) == (factors[k] != 0)
    continue_from_the_middle(whole, again)
    train_here(again, cache, chosen)
    assert rows(again) == found
    assert_same_weights(again, whole)
    assert str(checkpoint(again)["balance"]) == str(checkpoint(whole)["balance"])
    assert checkpoint(whole)["balance"]["rule"] == rule


@pytest.mark.parametrize(
    ("rule", "mtp"),
    [
        (rule, mtp) if (rule, mtp) in FAST else pytest.param(rule, mtp, marks=pytest.mark.long)
        for rule in RULES
        for mtp in ("sequential", "parallel")
    ],
)
def test_accumulation_is_a_larger_batch(tmp_path: Path, cache: Path, rule: str, mtp: str) -> None:
    common = settings(rule) | {
        "mtp": mtp,
        "model.n_layers": 2,
        # Documents of about 50 bytes: every micro-batch has counts of its own.
        "data.document_mask": "true",
        "data.source.documents": 1200,
        "data.eval_batch_size": 8,
        "trainer.max_steps": 5,
        "trainer.precision": "64-true",
    }
    parts, whole = tmp_path / "4x2", tmp_path / "1x8"
    split = {"data.batch_size": 2, "trainer.accumulate_grad_batches": 4}
    train_here(parts, cache, common | split)
    train_here(whole, cache, common | {"data.batch_size": 8})
    for one, other in zip(rows(parts), rows(whole), strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    right = weights(whole)
    for name, tensor in weights(parts).items():
        torch.testing.assert_close(tensor, right[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.long
def test_two_processes_equal_one(tmp_path: Path, cache: Path) -> None:
    common = {
        "data.document_mask": "true",
        "data.source.documents": 1200,
        "trainer.max_steps": 6,
        "trainer.precision": "64-true",
    }
    two = {
        "trainer.devices": 2,
        "trainer.strategy": "ddp",
        "data.batch_size": 2,
        "trainer.accumulate_grad_batches": 2,
    }
    runs = {rule: settings(rule) | common | two for rule in RULES}
    run_all(tmp_path, cache, runs, processes=2)
    for rule in RULES:
        one = tmp_path / f"{rule}_alone"
        train_here(one, cache, settings(rule) | common | {"data.batch_size": 8})
        shared, alone = rows(tmp_path / rule), rows(one)
        assert [row["step"] for row in shared] == list(range(1, 7))
        train_only = ("train/", "balance/", "grad/")
        for left, right in zip(shared, alone, strict=True):
            left, right = (
                {tag: v for tag, v in row.items() if tag.startswith(train_only)}
                for row in (left, right)
            )
            assert left == pytest.approx(right, rel=1e-5), rule
        expected = weights(one)
        for name, tensor in weights(tmp_path / rule).items():
            torch.testing.assert_close(
                tensor, expected[name], rtol=1e-4, atol=1e-6, msg=f"{rule}, {name}"
            )


@pytest.mark.parametrize("rule", MEASURING)
def test_measuring_rules_log_norms_and_count_their_cost(
    tmp_path: Path, cache: Path, rule: str
) -> None:
    summary = train_here(tmp_path / "run", cache, settings(rule))
    where = "" if rule == "gradnorm" else "trunk_"
    tags = [f"grad/{where}norm_depth_{k}" for k in range(3)]
    measured = [[tag in row for tag in tags] for row in rows(tmp_path / "run")]
    every = 1 if rule == "cosine_gate" else 2
    last = 9 if rule == "trunk_ratio" else 10  # at rest in the last tenth
    assert measured == [[step % every == 0 and step <= last] * 3 for step in range(1, 11)]
    plain = summary["flops_per_token"] * summary["tokens"]
    assert 1.2 * plain < summary["flops"] < 3.5 * plain


def test_a_rule_that_never_measures_is_training_with_fixed_weights(
    tmp_path: Path, cache: Path, fixed: Path
) -> None:
    idle = {"balance.every_n_steps": 1000}
    train_here(tmp_path / "idle", cache, settings("trunk_ratio") | idle)
    assert rows(tmp_path / "idle") == rows(fixed)
    assert_same_weights(tmp_path / "idle", fixed)


def test_the_gate_keeps_an_opposing_depth_from_the_trunk_alone(tmp_path: Path, cache: Path) -> None:
    """With a gate that is always shut, the trunk trains as though detached; modules go on."""
    from mtp_lightning.objective.balance.cosine_gate import CosineGate

    # The gradients are not clipped: their norm would join what the gate separates.
    common = {
        "balance": "cosine_gate",
        "lambda_schedule": "constant",
        "trainer.max_steps": 1,
        "trainer.gradient_clip_val": "null",
        "trainer.precision": "64-true",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CosineGate, "is_open", lambda self, k: False)
        train_here(tmp_path / "shut", cache, common)
    train_here(tmp_path / "plain", cache, common | {"balance": "none", "mtp_lambda": 0})
    train_here(tmp_path / "fixed", cache, common | {"balance": "none"})
    shut, plain, fixed = (_first_moments(tmp_path / name) for name in ("shut", "plain", "fixed"))
    trunk = [n for n in shut if ".trunk.blocks." in n or ".trunk.norm." in n]
    assert len(trunk) > 5
    for name in shut:
        expected = plain if name in trunk else fixed
        torch.testing.assert_close(shut[name], expected[name], rtol=1e-5, atol=1e-9, msg=name)
    assert any(not torch.allclose(plain[name], fixed[name], rtol=1e-3) for name in trunk)


def _first_moments(folder: Path) -> dict[str, torch.Tensor]:
    """The first step's gradients (times 1 - beta), by name; the optimizer has matrices first."""
    content = checkpoint(folder)
    named = {n: t for n, t in content["state_dict"].items() if n.startswith("model.")}
    ordered = [n for n, t in named.items() if t.dim() >= 2]
    ordered += [n for n, t in named.items() if t.dim() < 2]
    if torch.equal(named["model.head.weight"], named["model.trunk.embedding.weight"]):
        ordered.remove("model.head.weight")
    state = content["optimizer_states"][0]["state"]
    return {ordered[i]: entry["exp_avg"] for i, entry in state.items()}


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
def test_without_depths_every_rule_is_plain_training(
    tmp_path: Path, cache: Path, rule: str
) -> None:
    plain = {"mtp": "none", "mtp.depth": 0, "trainer.max_steps": 3}
    train_here(tmp_path / "rule", cache, plain | {"balance": rule})
    train_here(tmp_path / "none", cache, plain)
    assert rows(tmp_path / "rule") == rows(tmp_path / "none")


def test_another_rule_cannot_go_on_from_a_checkpoint(tmp_path: Path, cache: Path) -> None:
    train_here(tmp_path, cache, {"trainer.max_steps": 2})
    with pytest.raises(ValueError, match="balance=none.*balance=dwa.*another run_dir"):
        train_here(tmp_path, cache, {"trainer.max_steps": 4, "balance": "dwa"})


def test_a_frozen_trunk_is_refused_by_rules_that_measure(tmp_path: Path, cache: Path) -> None:
    for rule in MEASURING:
        with pytest.raises(ValueError, match=f"balance={rule} measures .*mtp.detach=trunk"):
            train_here(tmp_path, cache, {"balance": rule, "mtp.detach": "trunk"})


def test_matched_flops_know_what_a_rule_costs(tmp_path: Path, cache: Path) -> None:
    """The steps that are taken away pay for the measurements and give back what sampling saves."""
    from mtp_lightning.experiment.build import match_reference

    def steps(rule: str) -> int:
        chosen = {"balance": rule, "lambda_schedule": "constant", "compare.match": "flops"}
        cfg, _ = match_reference(
            config(tmp_path, cache, chosen | {"mtp": "parallel", "model.n_layers": 2}), 260
        )
        return cfg.trainer.max_steps

    long = {rule: steps(rule) for rule in ("none", "random", "cosine_gate", "sampled_depths")}
    assert long["cosine_gate"] < long["none"] == long["random"] < long["sampled_depths"]


@pytest.mark.long
@pytest.mark.parametrize("rule", RULES)
def test_command_line(tmp_path: Path, cache: Path, rule: str) -> None:
    done = execute(command(tmp_path / "run", cache, {"debug": "fast", "balance": rule}))
    assert done.returncode == 0, done.stderr
    assert max(column(tmp_path / "run", "train/loss")) == 10
