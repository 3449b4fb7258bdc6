"""Settings that give the same run: lambda 0 and no heads, accumulation and a larger batch."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.integration import helpers
from tests.integration.helpers import assert_near_rows, column, rows, train_here, typed, weights


def test_lambda_zero_is_plain_training_to_the_last_bit(tmp_path: Path, cache: Path) -> None:
    with_modules, plain = tmp_path / "d2", tmp_path / "d0"
    common = {"trainer.max_steps": 12, "data.batch_size": 3}
    train_here(with_modules, cache, common | {"mtp.depth": 2, "mtp_lambda": 0})
    train_here(plain, cache, common | {"mtp": "none", "mtp.depth": 0})
    for tag in ("train/loss", "train/loss_depth_0", "train/lr", "val/loss_depth_0"):
        assert column(with_modules, tag) == column(plain, tag) != {}
    assert len(column(plain, "train/loss_depth_0")) == 12
    a, b = weights(with_modules), weights(plain)
    assert {name for name in a if ".mtp." not in name} == b.keys()
    assert [name for name in b if not torch.equal(a[name], b[name])] == []


def test_depth_0_equals_a_run_without_heads(tmp_path: Path, cache: Path, finished: Path) -> None:
    train_here(tmp_path / "none", cache, {"mtp": "none", "mtp.depth": 0})
    train_here(tmp_path / "zero", cache, {"mtp.depth": 0})
    assert rows(tmp_path / "none") == rows(tmp_path / "zero")
    stored = [
        helpers.checkpoint(tmp_path / name)["model_config"]["mtp"] for name in ("none", "zero")
    ]
    assert stored[0] == stored[1] and stored[0]["variant"] == "none"
    # The test above could not fail if the modules' losses never reached the trunk.
    a, b = (column(run, "train/loss_depth_0") for run in (finished, tmp_path / "none"))
    assert a[1] == b[1] and a[10] != b[10]


def test_accumulation_equals_a_larger_batch(tmp_path: Path, cache: Path) -> None:
    # Documents of about 50 bytes: with the mask every micro-batch has other counts.
    # Validation batches are not accumulated: both see the same ones.
    common = typed(
        "data.document_mask=true data.source.documents=1200 data.eval_batch_size=8 "
        "trainer.max_steps=6 trainer.precision=64-true"
    )
    parts, whole = tmp_path / "4x2", tmp_path / "1x8"
    train_here(parts, cache, common | typed("data.batch_size=2 trainer.accumulate_grad_batches=4"))
    train_here(whole, cache, common | {"data.batch_size": 8})
    assert len(rows(whole)) == 6
    assert_near_rows(parts, whole, rel=1e-6)
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-7, atol=1e-9)


def test_a_run_repeats_bit_for_bit_and_another_seed_differs(tmp_path, cache, finished):
    train_here(tmp_path / "again", cache)
    helpers.assert_same_run(tmp_path / "again", finished)
    train_here(tmp_path / "other", cache, {"seed": 1, "trainer.max_steps": 1})
    losses = [column(run, "train/loss")[1] for run in (tmp_path / "other", finished)]
    assert losses[0] != losses[1]
