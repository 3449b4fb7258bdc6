"""A run that branches from another equals the one that was never branched, to the last bit."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mtp_lightning.errors import UserError
from mtp_lightning.experiment.branching import check_branch
from mtp_lightning.opening import open_model
from mtp_lightning.run import checkpoints
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import assert_equal, checkpoint, column, train_here, typed
from tests.integration.several import run_all

# A validation at every step would hide whether the place in the data is right: 1.5 kB are epochs of
# 21 batches, and the depths' lambdas move.
SETTINGS = typed(
    "data.source.size=1500 data.source.documents=10 lambda_schedule=constant "
    "optimizer/schedule=wsd optimizer.schedule.warmup_steps=5 "
    "optimizer.schedule.decay_fraction=0.25 trainer.val_check_interval=10"
)
AT, LENGTH = 24, 32  # the branch's first step, and its last
PARENT = SETTINGS | typed(
    "optimizer.schedule.kind=constant trainer.max_steps=30 "
    f"callbacks.checkpoints.keep_steps=[12,{AT}]"
)
WHOLE = {**SETTINGS, "trainer.max_steps": LENGTH}


@pytest.fixture(scope="module")
def parent(once: Once, cache: Path) -> Path:
    """The run that the tests branch from."""
    return once("parent", lambda folder: train_here(folder, cache, PARENT))


@pytest.fixture(scope="module")
def unbranched(once: Once, cache: Path) -> Path:
    """The run that was never branched."""
    return once("unbranched", lambda folder: train_here(folder, cache, WHOLE))


def assert_same_end(a: Path, b: Path) -> None:
    """Both runs' last checkpoints hold the same but for the clock and their settings."""
    without = ("seconds", "config", "callbacks", "loops", "hparams_name")
    assert_equal(checkpoint(a), checkpoint(b), without=without)


def test_a_branch_equals_an_unbranched_run(parent, unbranched, cache, tmp_path):
    summary = train_here(tmp_path / "branch", cache, {**WHOLE, "branch_from": f"{parent}@{AT}"})
    assert_same_end(tmp_path / "branch", unbranched)
    for tag in ("train/loss", "train/loss_depth_2", "train/lr", "val/loss_depth_0"):
        whole = {step: v for step, v in column(unbranched, tag).items() if step > AT}
        assert column(tmp_path / "branch", tag) == whole and whole
    assert summary["branch_from"] == f"{parent}@{AT}" and summary["step"] == LENGTH
    assert summary["flops"] == checkpoint(unbranched)["progress"]["flops"]
    best = tmp_path / "branch" / "checkpoints" / "best.ckpt"
    assert checkpoints.stored_step(best) > AT  # not the parent's
    # The branch continues as any run does.
    longer = {**WHOLE, "branch_from": f"{parent}@{AT}", "trainer.max_steps": LENGTH + 5}
    assert train_here(tmp_path / "branch", cache, longer)["step"] == LENGTH + 5


@pytest.mark.slow
def test_a_branch_without_changes_equals_its_parent(parent, cache, tmp_path):
    # By the command line: the check of paths before torch is imported knows RUN@STEP.
    helpers.train_apart(tmp_path / "same", cache, {**PARENT, "branch_from": f"{parent}@12"})
    assert_same_end(tmp_path / "same", parent)


def test_keep_steps_keeps_checkpoints_of_these_steps(parent):
    files = {path.name: path for path in (parent / "checkpoints").glob("step_*.ckpt")}
    assert files.keys() == {"step_12.ckpt", f"step_{AT}.ckpt"}
    assert checkpoints.stored_step(files["step_12.ckpt"]) == 12


def test_a_checkpoint_of_a_step_is_opened_like_a_run(parent):
    opened = open_model(f"{parent}@12")
    assert (opened.step, opened.path.name) == (12, "step_12.ckpt")
    assert open_model(str(opened.path)).step == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"branch_from": "{parent}@13"}, "has no intact checkpoint of step 13 (there are: 12, 24"),
        ({"branch_from": "{parent}"}, "names no checkpoint"),
        ({"branch_from": "{parent}-nowhere@12"}, "there is no run in"),
        ({"seed": 1}, "; seed: 0 -> 1. Start a new run"),
        ({"optimizer.lr": 0.01}, "this one changes optimizer.lr: 0.003 -> 0.01"),
        ({"data.source.size": 4_000}, "this one changes data.source.size"),
        ({"balance": "random"}, "was trained with balance=none"),
        ({"optimizer": "muon", "optimizer.lr": None}, "of another optimizer (AdamWConfig, not"),
        ({"objective": "kl"}, "this one changes objective"),
        ({"mtp.depth": 1}, "another run_dir (init_from=RUN takes its trunk)"),
        ({"trainer.accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: 1 -> 2"),
        ({"mtp_lambda": 0.1}, "the lambdas of step 0 were [0.15, 0.15], and under"),
        ({"optimizer.schedule.decay_fraction": 0.5}, "the learning rate of step 17 was 1 of its"),
        ({"optimizer.schedule.warmup_steps": 9}, "the learning rate of step 0 was 0.2 of its peak"),
        ({"trainer.max_steps": AT}, f"trainer.max_steps={AT}: step {AT} is done"),
        ({"compare.match": "flops"}, "with compare.match=flops, which sets a run's length"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_changed_setting_or_a_missing_checkpoint_is_refused(
    parent, cache, tmp_path, settings, message
):
    settings = {**WHOLE, "branch_from": "{parent}@" + str(AT), **settings}
    settings["branch_from"] = settings["branch_from"].format(parent=parent)
    with pytest.raises((UserError, FileNotFoundError), match=re.escape(message)):
        train_here(tmp_path / "refused", cache, settings)
    assert not (tmp_path / "refused").exists()


def test_a_run_with_a_matched_length_is_not_branched():
    stored = {"config": {"compare": {"match": "flops"}}}
    cfg = OmegaConf.create({"branch_from": "runs/a@12", "compare": {"match": "none"}})
    with pytest.raises(UserError, match="compare.match=flops set that run's length"):
        check_branch(stored, cfg)


@pytest.mark.parametrize(
    ("rule", "other"),
    [
        ("++callbacks.early_stopping.min_delta=9 {}=1", "++callbacks.early_stopping.patience"),
        ("{}=99", "++callbacks.early_stopping.stopping_threshold"),
    ],
    ids=["patience", "threshold"],
)
def test_a_branch_that_early_stopping_would_end_at_once_is_refused(
    parent, cache, tmp_path, rule, other
):
    stopping = typed(f"callbacks=early_stopping {rule.format(other)}")
    stopped = train_here(tmp_path / "ended", cache, {**PARENT, **stopping})["step"]
    branch = {**WHOLE, **stopping, "branch_from": f"{tmp_path / 'ended'}@{stopped}"}
    with pytest.raises(UserError, match="would end this one before its first step: give more"):
        train_here(tmp_path / "refused", cache, branch)
    assert not (tmp_path / "refused").exists()
    assert train_here(tmp_path / "other", cache, {**branch, other: 2})["step"] > stopped


def test_a_balance_rule_that_freezes_by_run_length_is_refused(cache, tmp_path):
    frozen = {"balance": "trunk_ratio", "balance.frozen": 0.5}
    train_here(tmp_path / "parent", cache, {**PARENT, **frozen})
    settings = {**WHOLE, **frozen, "branch_from": f"{tmp_path / 'parent'}@{AT}"}
    with pytest.raises(UserError, match=r"balance\.frozen=0\.5 freezes the last share of a run"):
        train_here(tmp_path / "refused", cache, settings)


@pytest.mark.parametrize(("step", "fits"), [(2, True), (3, False)])
def test_a_branch_from_the_step_at_which_a_rule_freezes_is_allowed(cache, tmp_path, step, fits):
    # (1 - 0.9) * 20 is one ulp less than 2.
    frozen = {**helpers.CONSTANT, "balance": "trunk_ratio", "balance.frozen": 0.9}
    old, new = (
        helpers.config(tmp_path, cache, {**frozen, "trainer.max_steps": n}) for n in (20, 40)
    )
    stored = {
        "config": OmegaConf.to_container(old, resolve=True),
        "global_step": step,
        "progress": {"tokens": step},
    }
    with nullcontext() if fits else pytest.raises(UserError, match="Branch from an earlier step"):
        check_branch(stored, new)


def test_schedules_in_tokens_are_compared_at_the_tokens_that_were_read(cache, tmp_path):
    """Nine steps read 17 tokens: 1.9 per step, and not 1."""
    in_tokens = {"lambda_schedule": "knots", "lambda_schedule.unit": "tokens"}
    old, new = (
        helpers.config(tmp_path, cache, {**in_tokens, "lambda_schedule.knots": knots})
        for knots in ({0: 1}, {0: 1, 12: 1, 13: 0.5})
    )
    config = OmegaConf.to_container(old, resolve=True)
    stored = {"config": config, "global_step": 9, "progress": {"tokens": 17}}
    with pytest.raises(UserError, match="the lambdas of step 7 were"):
        check_branch(stored, new)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"trainer.strategy": "ddp"},
        pytest.param({"trainer.strategy": "fsdp"}, marks=pytest.mark.long),
        {"trainer.strategy": "fsdp", "trainer.split_checkpoint_gb": 0},
    ],
    ids=["ddp", "fsdp", "fsdp-in-parts"],
)
def test_a_branch_of_two_processes_equals_an_unbranched_run(cache, tmp_path, settings):
    two = {"trainer.devices": 2, **settings}
    runs = {
        "parent": {**PARENT, **two},
        "branch": {**WHOLE, **two, "branch_from": f"{tmp_path / 'parent'}@{AT}"},
        "unbranched": {**WHOLE, **two},
    }
    run_all(tmp_path, cache, runs, processes=2)
    assert_same_end(tmp_path / "branch", tmp_path / "unbranched")
