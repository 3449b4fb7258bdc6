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
            outputs["computed"][self.bad_depth] = self.active
        return outputs


@pytest.mark.parametrize(
    ("bad_step", "every", "words"),
    [
        (7, 3, ("step 7", "depth 1 (nan)", "last.ckpt (step 6)", "Lower the learning rate")),
        (7, 1, ("step 7", "depth 1 (nan)", "last.ckpt (step 6)")),  # a checkpoint is due at it
        (7, 100, ("step 7", "no good checkpoint had been written")),
        (1, 100, ("step 1", "No weight has changed yet")),
    ],
)
def test_the_error_names_step_depth_and_the_last_good_checkpoint(tmp_path, bad_step, every, words):
    module = BadLoss()
    module.bad_step = bad_step
    checkpoints = Checkpoints(tmp_path, every_n_steps=every, monitor=None)
    with pytest.raises(ValueError) as error:
        fit(module, [checkpoints, NanGuard()])
    for word in words:
        assert word in str(error.value)
    last = tmp_path / "last.ckpt"
    assert (files.load(last)["global_step"] == 6) if every < 100 else not last.exists()


def test_a_checkpoint_before_the_first_step_is_saved(tmp_path: Path) -> None:
    class SavesFirst(TinyModule):
        def on_fit_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(SavesFirst(), [Checkpoints(tmp_path), NanGuard()], max_steps=1)
    assert files.load(tmp_path / "first.ckpt")["global_step"] == 0


class OnDevice(NanGuard):
    """Checks as rarely as it would on a GPU."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        look, self._look = self._look, lambda trainer: None
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._look = look
        if len(self._pending) >= self.every_n_steps:
            self._look(trainer)


@pytest.mark.parametrize(("every", "saved", "seen_at"), [(10, 100, 10), (5, 100, 10), (100, 4, 8)])
def test_rare_checks_name_the_first_bad_step(tmp_path, every, saved, seen_at):
    module = BadLoss()
    checkpoints = Checkpoints(tmp_path, every_n_steps=saved, monitor=None)
    with pytest.raises(ValueError, match="step 7: depth 1"):
        fit(module, [checkpoints, OnDevice(every_n_steps=every)], max_steps=30, val_every=100)
    assert max(module.losses) == seen_at, "checked together, or before a checkpoint"
    assert (tmp_path / "last.ckpt").exists() == (saved == 4)


def test_the_first_step_has_its_own_remedy_however_late_it_is_checked(tmp_path: Path) -> None:
    module = BadLoss()
    module.bad_step = 1
    with pytest.raises(ValueError, match="step 1: depth 1.*No weight has changed yet"):
        fit(module, [OnDevice(every_n_steps=10)], max_steps=30, val_every=100)


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

    message = r"layer.weight is not finite after optimizer step 6.*\(step 3\). Lower the learning"
    with pytest.raises(ValueError, match=message):
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
