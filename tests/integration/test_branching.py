"""A run that branches from another equals the one that was never branched, to the last bit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mtp_lightning.errors import UserError
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
AT, LENGTH = 24, 32
LONG = SETTINGS | typed(
    "optimizer.schedule.kind=constant trainer.max_steps=30 "
    f"callbacks.checkpoints.keep_steps=[12,{AT}]"
)
DIRECT = {**SETTINGS, "trainer.max_steps": LENGTH}


@pytest.fixture(scope="module")
def long(once: Once, cache: Path) -> Path:
    """The run that others branch from."""
    return once("long", lambda folder: train_here(folder, cache, LONG))


@pytest.fixture(scope="module")
def direct(once: Once, cache: Path) -> Path:
    """The run that was never branched."""
    return once("direct", lambda folder: train_here(folder, cache, DIRECT))


def assert_same_end(a: Path, b: Path) -> None:
    """Both runs' last checkpoints hold the same but for the clock and their settings."""
    without = ("seconds", "config", "callbacks", "loops", "hparams_name")
    assert_equal(checkpoint(a), checkpoint(b), without=without)


def test_a_branch_equals_the_run_that_was_not_branched(long, direct, cache, tmp_path):
    summary = train_here(tmp_path / "branch", cache, {**DIRECT, "branch_from": f"{long}@{AT}"})
    assert_same_end(tmp_path / "branch", direct)
    for tag in ("train/loss", "train/loss_depth_2", "train/lr", "val/loss_depth_0"):
        whole = {step: v for step, v in column(direct, tag).items() if step > AT}
        assert column(tmp_path / "branch", tag) == whole and whole
    assert summary["branch_from"] == f"{long}@{AT}" and summary["step"] == LENGTH
    assert summary["flops"] == checkpoint(direct)["progress"]["flops"]
    best = tmp_path / "branch" / "checkpoints" / "best.ckpt"
    assert checkpoints.stored_step(best) > AT  # its own, not the one of the run before
    # Its folder is a run like any other, which continues.
    more = {**DIRECT, "branch_from": f"{long}@{AT}", "trainer.max_steps": LENGTH + 5}
    assert train_here(tmp_path / "branch", cache, more)["step"] == LENGTH + 5


@pytest.mark.slow
def test_a_branch_with_nothing_changed_equals_its_run(long, cache, tmp_path):
    # As one types it: what looks at paths before torch is there knows RUN@STEP.
    helpers.train_apart(tmp_path / "same", cache, {**LONG, "branch_from": f"{long}@12"})
    assert_same_end(tmp_path / "same", long)


def test_checkpoints_that_are_asked_for_stay(long):
    kept = {path.name: path for path in (long / "checkpoints").glob("step_*.ckpt")}
    assert kept.keys() == {"step_12.ckpt", f"step_{AT}.ckpt"}
    assert checkpoints.stored_step(kept["step_12.ckpt"]) == 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"branch_from": "{long}@13"}, "has no intact checkpoint of step 13 (there are: 12, 24"),
        ({"branch_from": "{long}"}, "names no checkpoint"),
        ({"branch_from": "{long}-nowhere@12"}, "there is no run in"),
        ({"seed": 1}, "; seed: 0 -> 1. Start a new run"),
        ({"optimizer.lr": 0.01}, "this one changes optimizer.lr: 0.003 -> 0.01"),
        ({"data.source.size": 4_000}, "this one changes data.source.size"),
        ({"balance": "random"}, "was trained with balance=none"),
        ({"optimizer": "muon", "optimizer.lr": None}, "of another optimizer (AdamWConfig, not"),
        ({"objective": "kl"}, "this one changes objective"),
        ({"mtp.depth": 1}, "holds another architecture than this config"),
        ({"trainer.accumulate_grad_batches": 2}, "trainer.accumulate_grad_batches: 1 -> 2"),
        ({"mtp_lambda": 0.1}, "the lambdas of step 0 were [0.15, 0.15], and under"),
        ({"optimizer.schedule.decay_fraction": 0.5}, "the learning rate of step 17 was 1 of its"),
        ({"optimizer.schedule.warmup_steps": 9}, "the learning rate of step 0 was 0.2 of its peak"),
        ({"trainer.max_steps": AT}, f"trainer.max_steps={AT}: step {AT} is done"),
        ({"compare.match": "flops"}, "with compare.match=flops, which sets a run's length"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_branch_is_refused_with_its_reason(long, cache, tmp_path, settings, says):
    asked = {**DIRECT, "branch_from": "{long}@" + str(AT), **settings}
    asked["branch_from"] = asked["branch_from"].format(long=long)
    with pytest.raises((UserError, FileNotFoundError), match=re.escape(says)):
        train_here(tmp_path / "refused", cache, asked)
    assert not (tmp_path / "refused").exists()


def test_a_rule_that_froze_its_lambdas_in_one_run_alone_is_refused(cache, tmp_path):
    frozen = {"balance": "trunk_ratio", "balance.frozen": 0.5}
    train_here(tmp_path / "long", cache, {**LONG, **frozen})
    asked = {**DIRECT, **frozen, "branch_from": f"{tmp_path / 'long'}@{AT}"}
    with pytest.raises(UserError, match=r"balance\.frozen=0\.5 freezes the last share of a run"):
        train_here(tmp_path / "refused", cache, asked)


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
def test_two_processes_branch_likewise(cache, tmp_path, settings):
    two = {"trainer.devices": 2, **settings}
    runs = {
        "long": {**LONG, **two},
        "branch": {**DIRECT, **two, "branch_from": f"{tmp_path / 'long'}@{AT}"},
        "direct": {**DIRECT, **two},
    }
    run_all(tmp_path, cache, runs, processes=2)
    assert_same_end(tmp_path / "branch", tmp_path / "direct")
