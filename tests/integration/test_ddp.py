"""Two processes (gloo) train as one does with twice the batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration import helpers
from tests.integration.helpers import DDP, assert_near_rows, column, train_apart, typed, weights

# Of all validation windows: also batches that do not divide evenly.
COMMON = typed(
    "trainer.max_steps=9 trainer.val_check_interval=4 trainer.precision=64-true logger=default "
    "data.eval_bytes=all data.val_fraction=0.1 data.eval_batch_size=3"
)
CASES = {
    # Documents of about 50 bytes: every rank and micro-batch has counts of its own.
    "mask": typed("data.document_mask=true data.source.documents=1200"),
    # Stages with 0, 1 and 2 depths: parameters without a gradient, and others a stage later.
    "skip": typed("lambda_schedule=forward_curriculum"),
    # Documents of about 20 bytes in windows of 4: steps in which depth 3 has no target. Every
    # fourth seed or so has such a step among the first 40, this one steps 2 and 15.
    "empty": typed(
        "data.document_mask=true data.source.documents=3000 data.seq_len=4 data.val_fraction=0.01 "
        "mtp.depth=3 trainer.max_steps=40 trainer.val_check_interval=40 seed=47"
    ),
}
SPLIT = typed("data.batch_size=2 trainer.accumulate_grad_batches=2")
# Windows of a step; each of the two processes takes half.
SIZES = {"mask": 8, "skip": 8, "empty": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [c if c == "mask" else pytest.param(c, marks=pytest.mark.long) for c in CASES]
)
def test_two_processes_equal_one(tmp_path: Path, cache: Path, case: str) -> None:
    common = COMMON | CASES[case]
    shared = SPLIT if case == "mask" else {"data.batch_size": SIZES[case] // 2}
    done = train_apart(tmp_path / "two", cache, common | shared | DDP)
    helpers.train_here(tmp_path / "one", cache, common | {"data.batch_size": SIZES[case]})
    assert_near_rows(tmp_path / "two", tmp_path / "one")
    assert len(helpers.rows(tmp_path / "one")) == common["trainer.max_steps"]
    two_weights, one_weights = weights(tmp_path / "two"), weights(tmp_path / "one")
    torch.testing.assert_close(two_weights, one_weights, rtol=1e-6, atol=1e-8)
    two_summary, one_summary = (helpers.summary_of(tmp_path / name) for name in ("two", "one"))
    for key in ("tokens", "flops", "step", "parameters"):
        assert two_summary[key] == one_summary[key] > 0, key
    assert two_summary["world_size"] == 2
    for key in (k for k in one_summary if k.startswith("val/")):
        assert two_summary[key] == pytest.approx(one_summary[key], rel=1e-6), key
    # One process evaluates what two did, to the last bit.
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    overrides = [f"paths.cache_dir={cache}", "long_range=false", "decode.n_prompts=0"]
    again = helpers.evaluated(last, *overrides)
    for key in (k for k in one_summary if k.startswith("val/") or k == "evaluation"):
        assert again[key] == two_summary[key], key
    # One process writes: one table, and no files of a second run.
    assert done.stdout.count("Result") == 1
    if case == "skip":
        assert len(column(tmp_path / "two", "train/loss_depth_0")) == 9
        assert 0 < len(column(tmp_path / "two", "train/loss_depth_2")) < 9
    if case == "empty":
        assert len(column(tmp_path / "two", "train/loss_depth_0")) == 40
        assert 0 < len(column(tmp_path / "two", "train/loss_depth_3")) < 40
        assert min(column(tmp_path / "two", "train/lambda_depth_3").values()) == 0.0


@pytest.mark.slow
def test_two_killed_and_resumed_processes_equal_uninterrupted_ones(tmp_path, cache):
    common = DDP | typed(
        "trainer.max_steps=100 trainer.val_check_interval=100 lambda_schedule=linear_decay "
        "callbacks.checkpoints.every_n_steps=10"
    )
    train_apart(tmp_path / "whole", cache, common)
    helpers.kill_at(helpers.command(tmp_path / "killed", cache, common), tmp_path / "killed", 25)
    assert helpers.checkpoint(tmp_path / "killed")["global_step"] < 100
    train_apart(tmp_path / "killed", cache, common)
    helpers.assert_same_run(tmp_path / "killed", tmp_path / "whole")
