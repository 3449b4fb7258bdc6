"""A loss or weight that is not finite stops the run and never reaches a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_run import TinyModule, fit

from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.callbacks.nan_guard import NanGuard
from mtp_lightning.run import checkpoints as files


class BadLoss(TinyModule):
    """Reports a loss that is not finite for one depth from one step on."""

    bad_step, bad_depth, active = 7, 1, True

    def training_step(self, batch, batch_idx):
        outputs = super().training_step(batch, batch_idx)
        if self.global_step >= self.bad_step:
            outputs["losses"][self.bad_depth] = float("nan")
            outputs["active"][self.bad_depth] = self.active
        return outputs


@pytest.mark.parametrize("every", [3, 1])  # with and without a checkpoint due at the bad step
def test_the_error_names_step_depth_and_the_last_good_checkpoint(tmp_path, every):
    with pytest.raises(ValueError) as error:
        fit(BadLoss(), [Checkpoints(tmp_path, every_n_steps=every), NanGuard()])
    for words in ("step 7", "depth 1 (nan)", str(tmp_path / "last.ckpt"), "(step 6)"):
        assert words in str(error.value)
    assert files.load(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_bad_first_step_does_not_blame_the_learning_rate(tmp_path: Path) -> None:
    module = BadLoss()
    module.bad_step = 1
    with pytest.raises(ValueError, match="No weight has changed yet"):
        fit(module, [Checkpoints(tmp_path, monitor=None), NanGuard()])


def test_a_checkpoint_before_the_first_step_is_saved(tmp_path: Path) -> None:
    class SavesFirst(TinyModule):
        def on_fit_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(SavesFirst(), [Checkpoints(tmp_path), NanGuard()], max_steps=1)
    assert files.load(tmp_path / "first.ckpt")["global_step"] == 0


def test_the_error_before_any_checkpoint_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no good checkpoint"):
        fit(BadLoss(), [Checkpoints(tmp_path, every_n_steps=100, monitor=None), NanGuard()])
    assert not list(tmp_path.glob("*.ckpt"))


class OnDevice(NanGuard):
    """Checks as rarely as it would on a GPU."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        look, self._look = self._look, lambda trainer: None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._look = look
        if len(self._pending) >= self.every_n_steps:
            self._look(trainer)


@pytest.mark.parametrize(("every", "seen_at"), [(10, 10), (5, 10), (100, 8)])
def test_rare_checks_name_the_first_bad_step(tmp_path: Path, every: int, seen_at: int) -> None:
    module = BadLoss()
    checkpoints = Checkpoints(tmp_path, every_n_steps=4 if every == 100 else 100, monitor=None)
    with pytest.raises(ValueError, match="step 7: depth 1"):
        fit(module, [checkpoints, OnDevice(every_n_steps=every)], max_steps=30, val_every=100)
    assert max(module.losses) == seen_at, "checked together, or before a checkpoint"
    assert module.losses and not (tmp_path / "last.ckpt").exists() or every == 100


def test_an_inactive_depth_may_be_nan(tmp_path: Path) -> None:
    module = BadLoss()
    module.active = False
    fit(module, [NanGuard(), Checkpoints(tmp_path)])
    assert files.load(tmp_path / "last.ckpt")["global_step"] == 12


def test_an_infinite_weight_is_found_before_a_loss_shows_it(tmp_path: Path) -> None:
    def spoil(module: TinyModule, step: int) -> None:
        if step == 6:
            with torch.no_grad():
                module.layer.weight[0, 0] = float("inf")

    with pytest.raises(
        ValueError, match=r"layer.weight is not finite after optimizer step 6.*\(step 3\)"
    ):
        fit(TinyModule(spoil), [NanGuard(), Checkpoints(tmp_path, every_n_steps=3, monitor=None)])
    assert files.load(tmp_path / "last.ckpt")["global_step"] == 3


def test_nothing_is_saved_after_a_failure(tmp_path: Path) -> None:
    guard = NanGuard()
    trainers = []

    class Remember(BadLoss):
        def on_train_start(self) -> None:
            trainers.append(self.trainer)

    module = Remember()
    with pytest.raises(ValueError):
        fit(module, [guard, Checkpoints(tmp_path)])
    with pytest.raises(ValueError, match="step 7"):
        guard.on_save_checkpoint(trainers[0], module, {})
