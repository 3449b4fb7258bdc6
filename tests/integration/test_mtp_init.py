"""``mtp.init=last_block`` in whole runs: first losses, resuming, two processes, and refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.integration import helpers
from tests.integration.conftest import Once

SHAPE = {"model.n_layers": 2, "data.seq_len": 32, "data.batch_size": 8}
HEADS = {
    **SHAPE, **helpers.CONSTANT, "mtp.depth": 3, "mtp.freeze_trunk": "true",
    "mtp.init": "last_block", "trainer.max_steps": 4,
}  # fmt: skip
TRUNK = {**SHAPE, "mtp": "none", "mtp.depth": None, "trainer.max_steps": 2}


@pytest.fixture(scope="module")
def trunk(once: Once, cache: Path) -> Path:
    longer = {"trainer.max_steps": 250, "trainer.val_check_interval": 250, "optimizer.lr": 0.01}
    return once("trunk", lambda folder: helpers.train_here(folder, cache, {**TRUNK, **longer}))


def first_losses(folder: Path) -> list[float]:
    return [helpers.column(folder, f"train/loss_depth_{k}")[1] for k in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "switches", [{}, {"mtp.share_layers": "true", "mtp.concat": "hidden_first"}]
)
def test_last_block_starts_heads_near_the_trunks_loss(trunk, cache, tmp_path, switches):
    settings = {**HEADS, **switches, "init_from": trunk}
    helpers.train_here(tmp_path / "last_block", cache, settings)
    trunk_loss = helpers.column(tmp_path / "last_block", "val/loss_depth_0")[4]
    helpers.train_here(tmp_path / "random", cache, {**settings, "mtp.init": "random"})
    copied, random = first_losses(tmp_path / "last_block"), first_losses(tmp_path / "random")
    assert trunk_loss < 0.6 * math.log(257)
    # Without a training step, at least half as much better than chance as the trunk.
    assert max(copied) < (trunk_loss + math.log(257)) / 2 < min(random)


def test_a_resumed_run_does_not_initialize_again(cache: Path, tmp_path: Path) -> None:
    helpers.train_here(tmp_path / "trunk", cache, TRUNK)
    settings = {**HEADS, "init_from": tmp_path / "trunk", "callbacks.checkpoints.every_n_steps": 2}
    helpers.train_here(tmp_path / "whole", cache, settings)
    helpers.train_here(tmp_path / "halves", cache, {**settings, "trainer.max_steps": 2})
    with pytest.raises(ValueError, match=r"began with mtp.init=last_block, not random"):
        helpers.train_here(tmp_path / "halves", cache, {**settings, "mtp.init": "random"})
    helpers.train_here(tmp_path / "halves", cache, settings)
    helpers.assert_same_weights(tmp_path / "whole", tmp_path / "halves")
    plain = {**settings, "mtp.init": "random", "trainer.max_steps": 2}
    helpers.train_here(tmp_path / "random", cache, plain)
    with pytest.raises(ValueError, match=r"began with mtp.init=random, not last_block: set"):
        helpers.train_here(tmp_path / "random", cache, {**plain, "mtp.init": "last_block"})


def test_a_start_that_does_not_fit_is_refused_before_the_data(cache, tmp_path, monkeypatch):
    """Self-generated texts take hours."""
    helpers.train_here(tmp_path / "whole", cache, {**HEADS, "mtp.init": "random"})
    monkeypatch.setattr("mtp_lightning.experiment.training.build_data", None)
    settings = {**HEADS, "init_from": tmp_path / "whole"}
    for changes, message in (
        ({}, r"mtp.init=last_block has no effect: .* holds every module"),
        ({"mtp.init": "random", "model.n_layers": 1}, r"another trunk than this run \(n_layers: 2"),
    ):
        with pytest.raises(ValueError, match=message):
            helpers.train_here(tmp_path / "new", cache, {**settings, **changes})


@pytest.mark.long
def test_two_processes_start_as_one_does(trunk: Path, cache: Path, tmp_path: Path) -> None:
    settings = {**HEADS, "init_from": trunk, "trainer.max_steps": 2}
    two = {"trainer.devices": 2, "trainer.strategy": "ddp", "data.batch_size": 4}
    helpers.train_apart(tmp_path / "two", cache, {**settings, **two})
    helpers.train_here(tmp_path / "one", cache, settings)
    assert first_losses(tmp_path / "two") == pytest.approx(first_losses(tmp_path / "one"), rel=2e-6)
    left, right = (helpers.weights(tmp_path / name) for name in ("two", "one"))
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_last_block_reads_the_examples_of_a_task(cache: Path, tmp_path: Path) -> None:
    task = {
        **helpers.NO_TEXT, "data": "star_graph", "data.eval_examples": 16, "data.seq_len": 60,
        "trainer.max_steps": 2, "trainer.val_check_interval": 2, "model.n_layers": 2,
    }  # fmt: skip
    helpers.train_here(tmp_path / "trunk", cache, {**task, "mtp": "none", "mtp.depth": None})
    heads = {**task, "init_from": tmp_path / "trunk", "mtp.init": "last_block"}
    helpers.train_here(tmp_path / "heads", cache, {**heads, "mtp.freeze_trunk": "true"})
    assert helpers.column(tmp_path / "heads", "train/loss_depth_2")[2] > 0
