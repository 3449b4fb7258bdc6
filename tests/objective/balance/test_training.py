"""The balance rules in runs: they do not depend on how a step is split, nor on where a run was
interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.experiment.build import apply_match, build_balance
from mtp_lightning.objective.balance.base import NoBalance
from tests.integration.helpers import (
    assert_same_weights,
    checkpoint,
    column,
    config,
    rows,
    train_here,
)
from tests.integration.several import assert_two_train_as_one

RULES = ["dwa", "uncertainty", "gradnorm", "cosine_gate", "trunk_ratio", "random", "sampled_depths"]
# Settings with which ten steps show the effect of a rule.
SETTINGS: dict[str, dict[str, Any]] = {
    "dwa": {"balance.window_steps": 2},
    "gradnorm": {"balance.every_n_steps": 2},
    "trunk_ratio": {"balance.every_n_steps": 2, "balance.rate": 0.1, "balance.frozen": 0.1},
    "sampled_depths": {"balance.probabilities": "loss_ratio"},
}


def settings(rule: str) -> dict[str, Any]:
    return {"balance": rule, "lambda_schedule": "constant", **SETTINGS.get(rule, {})}


@pytest.fixture(scope="module")
def fixed_weights(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with fixed weights."""
    folder = tmp_path_factory.mktemp("fixed")
    train_here(folder, cache, {"lambda_schedule": "constant"})
    return folder


def continue_from_the_middle(whole: Path, folder: Path) -> None:
    """Fill ``folder`` with the files of ``whole`` after half of its steps."""
    (folder / "checkpoints").mkdir(parents=True)
    middle = whole / "checkpoints" / "previous.ckpt"
    assert checkpoint(whole, "previous.ckpt")["global_step"] == 5
    shutil.copyfile(middle, folder / "checkpoints" / "last.ckpt")
    shutil.copyfile(whole / "metrics.csv", folder / "metrics.csv")


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["uncertainty", "gradnorm", "sampled_depths"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, cache: Path, fixed_weights: Path, rule: str
) -> None:
    """``test_rules.py`` tests the stored states of all rules."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    overrides = settings(rule) | {"callbacks.checkpoints.every_n_steps": 5}
    train_here(whole, cache, overrides)
    logged = rows(whole)
    # The rule has an effect: the last loss is not that of the run with fixed weights.
    assert column(whole, "train/loss")[10] != column(fixed_weights, "train/loss")[10]
    for row in logged:
        factors = [row.get("balance/main_factor", 1.0)]
        factors += [row[f"train/lambda_depth_{k}"] for k in (1, 2)]
        losses = [row.get(f"train/loss_depth_{k}", 0.0) for k in range(3)]
        total = sum(f * x for f, x in zip(factors, losses, strict=True))
        assert row["train/loss"] == pytest.approx(total, rel=1e-6)
        for k in (1, 2):  # a loss that was not computed is not logged
            assert (f"train/loss_depth_{k}" in row) == (factors[k] != 0)
    continue_from_the_middle(whole, resumed)
    train_here(resumed, cache, overrides)
    assert rows(resumed) == logged
    assert_same_weights(resumed, whole)
    assert str(checkpoint(resumed)["balance"]) == str(checkpoint(whole)["balance"])
    assert checkpoint(whole)["balance"]["rule"] == rule


@pytest.mark.long
def test_two_processes_train_by_a_rule_as_one(tmp_path: Path, cache: Path) -> None:
    assert_two_train_as_one(tmp_path, cache, {rule: settings(rule) for rule in RULES})


def test_with_matched_flops_a_rule_that_measures_gets_fewer_steps(
    tmp_path: Path, cache: Path
) -> None:
    """And a rule that skips depths gets more."""

    def steps_of(rule: str) -> int:
        overrides = {"balance": rule, "lambda_schedule": "constant", "compare.match": "flops"}
        overrides |= {"mtp": "parallel", "model.n_layers": 2}
        cfg, _ = apply_match(config(tmp_path, cache, overrides), 260)
        return cfg.trainer.max_steps

    steps = {rule: steps_of(rule) for rule in ("none", "random", "cosine_gate", "sampled_depths")}
    assert steps["cosine_gate"] < steps["none"] == steps["random"] < steps["sampled_depths"]


def test_another_rule_on_resume_and_one_without_gradients_are_refused(
    tmp_path: Path, cache: Path
) -> None:
    train_here(tmp_path, cache, {"trainer.max_steps": 2})
    with pytest.raises(ValueError, match="balance=none.*balance=dwa.*another run_dir"):
        train_here(tmp_path, cache, {"trainer.max_steps": 4, "balance": "dwa"})
    with pytest.raises(ValueError, match="balance=gradnorm measures .*mtp.detach=trunk"):
        train_here(tmp_path / "new", cache, {"balance": "gradnorm", "mtp.detach": "trunk"})


def test_a_model_without_depths_has_no_balance_rule(tmp_path: Path, cache: Path) -> None:
    cfg = config(tmp_path, cache, {"mtp": "none", "mtp.depth": 0, "balance": "dwa"})
    assert type(build_balance(cfg)) is NoBalance
