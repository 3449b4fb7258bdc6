"""Checkpoints are written at the right steps, and a run resumed from any of them equals
the uninterrupted one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from tiny_run import TinyModule, fit

from mtp_lightning.callbacks import checkpoints as module_under_test
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.loggers.csv import MetricsCSV
from mtp_lightning.run import checkpoints as files
from mtp_lightning.run.metrics import read_metrics


def step_of(path: Path) -> int:
    return files.load(path)["global_step"]


class Scores(TinyModule):
    """Logs scores at each validation, which are a function of the step."""

    def __init__(self, score: Callable[[int], float], name: str = "val/loss_depth_0") -> None:
        super().__init__()
        self.score, self.name = score, name

    def validation_step(self, batch, batch_idx) -> None:
        self.log_dict({"val/loss_depth_0": 2.0, self.name: self.score(self.global_step)})


class KeepEvery(Checkpoints):
    """Keeps a copy of every last.ckpt and of the metrics that were on disk at that moment."""

    def _save(self, trainer: pl.Trainer) -> None:
        before = self._saved_step
        super()._save(trainer)
        if self._saved_step != before:
            shutil.copy(self.last_path, self.folder.parent / f"at_{trainer.global_step}.ckpt")
            metrics = self.folder.parent / "metrics.csv"
            if metrics.exists():
                shutil.copy(metrics, self.folder.parent / f"at_{trainer.global_step}.csv")


def test_last_previous_and_best_are_of_these_steps(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # the run's folder, by default
    module, folder = TinyModule(), tmp_path / "checkpoints"
    fit(module, [saved := Checkpoints(every_n_steps=5)])
    assert sorted(os.listdir(folder)) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert saved.last_path == folder / "last.ckpt" and step_of(saved.last_path) == 12
    assert step_of(folder / "previous.ckpt") == 10
    assert module.val_steps == [4, 8, 12]


@pytest.mark.parametrize(("epoch_steps", "resumed"), [(6, [3, 4, 6, 9, 12]), (8, [8])])
def test_resume_from_every_checkpoint_equals_the_uninterrupted_run(tmp_path, epoch_steps, resumed):
    whole_folder = tmp_path / "whole"
    whole = TinyModule()
    fit(
        whole, [KeepEvery(whole_folder / "c", every_n_steps=3)], max_steps=13,
        loggers=[MetricsCSV(whole_folder)], epoch_steps=epoch_steps,
    )  # fmt: skip
    reference = read_metrics(whole_folder / "metrics.csv")
    assert [row["step"] for row in reference] == list(range(13))
    for step in resumed:
        run = tmp_path / f"from_{step}"
        run.mkdir()
        # The killed process continued after its checkpoint: all rows up to the end are there.
        shutil.copy(whole_folder / "metrics.csv", run / "metrics.csv")
        logger = MetricsCSV(run)
        logger.resume_from(step - 1)
        module = TinyModule()
        fit(
            module, [Checkpoints(run / "c", every_n_steps=3)], max_steps=13, loggers=[logger],
            ckpt_path=whole_folder / f"at_{step}.ckpt", epoch_steps=epoch_steps,
        )  # fmt: skip
        assert module.losses == {s: v for s, v in whole.losses.items() if s > step}, step
        assert module.val_steps == [s for s in whole.val_steps if s > step], step
        rows = read_metrics(run / "metrics.csv")
        assert [row | {"epoch": 0} for row in rows] == [row | {"epoch": 0} for row in reference]
        for a, b in zip(module.parameters(), whole.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("epoch_steps", [1000, 4])
def test_a_finished_run_that_is_extended_equals_the_longer_run(tmp_path, epoch_steps):
    long = TinyModule()
    fit(long, [], max_steps=11, epoch_steps=epoch_steps)
    checkpoints = Checkpoints(tmp_path, every_n_steps=100)
    fit(TinyModule(), [checkpoints], max_steps=6, epoch_steps=epoch_steps)
    loops = files.load(checkpoints.last_path)["loops"]["fit_loop"]
    assert loops["epoch_progress"]["current"]["processed"] == 6 // epoch_steps, "in mid epoch"
    more = TinyModule()
    fit(
        more, [checkpoints], max_steps=11, epoch_steps=epoch_steps,
        ckpt_path=checkpoints.last_path,
    )  # fmt: skip
    assert more.losses == {s: v for s, v in long.losses.items() if s > 6}
    assert more.val_steps == [8]


def test_a_save_comes_after_the_validation_of_its_step(tmp_path: Path) -> None:
    events = []

    class Order(Checkpoints):
        def on_validation_end(self, trainer, pl_module) -> None:
            events.append(("validated", trainer.global_step))
            super().on_validation_end(trainer, pl_module)

        def _save(self, trainer) -> None:
            if self._saved_step != trainer.global_step:
                events.append(("saved", trainer.global_step))
            super()._save(trainer)

    fit(TinyModule(), [Order(tmp_path, every_n_steps=2, monitor=None)], max_steps=6)
    assert events == [("saved", 2), ("validated", 4), ("saved", 4), ("saved", 6)]
    assert not (tmp_path / "best.ckpt").exists()


def test_best_is_a_link_to_last_and_survives_a_resume(tmp_path: Path) -> None:
    score = {4: 2.0, 8: 1.0, 12: 3.0, 16: 1.5}.__getitem__
    first = Checkpoints(tmp_path, every_n_steps=4)
    fit(Scores(score), [first], max_steps=8)
    assert first.last_path.samefile(first.best_path)
    resumed = Checkpoints(tmp_path, every_n_steps=4)
    fit(Scores(score), [resumed], max_steps=16, ckpt_path=first.last_path)
    assert (resumed.best_score, resumed.best_step) == (1.0, 8)
    assert step_of(tmp_path / "best.ckpt") == 8
    assert step_of(tmp_path / "last.ckpt") == 16


def test_another_monitor_starts_without_a_best(tmp_path: Path) -> None:
    module = partial(Scores, lambda step: 1 / step, name="val/accuracy_depth_0")
    first = Checkpoints(tmp_path)
    fit(module(), [first], max_steps=4)
    other = Checkpoints(tmp_path, monitor="val/accuracy_depth_0", mode="max")
    fit(module(), [other], max_steps=12, ckpt_path=first.last_path)
    assert (other.best_score, other.best_step) == (0.125, 8)
    assert step_of(other.best_path) == 8


@pytest.mark.parametrize("first_best", [4, 8])
def test_a_kill_between_a_save_and_its_links_loses_no_best(tmp_path, monkeypatch, first_best):
    scores = {4: 2.0, 8: 1.0, 12: 3.0, 16: 1.5}

    def score(step: int) -> float:
        return scores[step] if step >= first_best else float("nan")

    link = files.link_or_copy

    def killed(source: Path, target: Path) -> None:
        if target.name == "best.ckpt" and step_of(source) == 8:
            raise RuntimeError("killed")
        link(source, target)

    monkeypatch.setattr(module_under_test, "link_or_copy", killed)
    with pytest.raises(RuntimeError, match="killed"):
        checkpoints = Checkpoints(tmp_path, every_n_steps=100, keep_steps=[12])
        fit(Scores(score), [checkpoints], max_steps=16)
    monkeypatch.setattr(module_under_test, "link_or_copy", link)
    resumed = Checkpoints(tmp_path, every_n_steps=100, keep_steps=[8, 12])
    fit(Scores(score), [resumed], max_steps=16, ckpt_path=resumed.last_path)
    assert (resumed.best_score, resumed.best_step) == (1.0, 8)
    assert step_of(resumed.best_path) == step_of(tmp_path / "step_8.ckpt") == 8
    assert step_of(tmp_path / "step_12.ckpt") == 12 and step_of(resumed.last_path) == 16


def test_kept_steps_that_are_not_reached_or_have_passed_are_named(tmp_path, caplog):
    first = Checkpoints(tmp_path, keep_steps=[4, 900])
    fit(TinyModule(), [first], max_steps=8)
    assert "no checkpoint is kept of 900, since this run has done 0 of its 8" in caplog.text
    caplog.clear()
    more = Checkpoints(tmp_path, keep_steps=[3, 4, 8, 12])
    fit(TinyModule(), [more], max_steps=12, ckpt_path=first.last_path)
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "kept of 3, since this run has done 8 of its 12" in warning.getMessage()
    assert {p.name for p in tmp_path.glob("step_*")} == {f"step_{n}.ckpt" for n in (4, 8, 12)}


def test_the_newest_of_equal_scores_is_best(tmp_path: Path) -> None:
    """The main prediction of a frozen trunk stays the same, while its heads learn."""
    checkpoints = Checkpoints(tmp_path, every_n_steps=100)
    fit(Scores(lambda step: 2.0), [checkpoints], max_steps=12)
    assert checkpoints.best_step == step_of(tmp_path / "best.ckpt") == 12


@pytest.mark.parametrize(
    ("signum", "when"), [(signal.SIGINT, 6), (signal.SIGTERM, 4), (signal.SIGUSR1, 5)]
)
def test_a_signal_saves_the_step_in_which_it_arrives(tmp_path, monkeypatch, signum, when):
    monkeypatch.setenv("SLURM_JOB_ID", "7")  # Slurm sends SIGUSR1 before its time limit
    whole = TinyModule()
    fit(whole, [Checkpoints(tmp_path / "whole", every_n_steps=100)])

    def stop(module: TinyModule, step: int) -> None:
        if step == when:
            os.kill(os.getpid(), signum)

    checkpoints = Checkpoints(tmp_path / "c", every_n_steps=100)
    handlers = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            fit(TinyModule(stop), [checkpoints], loggers=[MetricsCSV(tmp_path)])
        # After a Ctrl-C, Lightning ignores further ones, and does not undo that.
        assert signal.getsignal(signal.SIGINT) in (handlers, signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGINT, handlers)
    assert step_of(checkpoints.last_path) == when
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.csv")] == list(range(when))
    module = TinyModule()
    fit(module, [Checkpoints(tmp_path / "c")], ckpt_path=checkpoints.last_path)
    assert module.losses == {s: v for s, v in whole.losses.items() if s > when}


def test_a_value_of_training_is_not_asked_of_a_validation_after_it(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, monitor="train/loss")
    fit(TinyModule(), [Checkpoints(tmp_path, monitor=None)], max_steps=5)
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(global_step=5, strategy=strategy, callback_metrics={})
    checkpoints._mark_last_as_best(trainer)
    assert checkpoints.best_step is None


def test_an_error_in_a_step_saves_nothing_and_keeps_the_last(tmp_path: Path) -> None:
    def fail(module: TinyModule, step: int) -> None:
        if step == 7:
            raise RuntimeError("in the middle of a step")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="middle"):
        fit(TinyModule(fail), [checkpoints := Checkpoints(tmp_path, every_n_steps=3)])
    assert step_of(checkpoints.last_path) == 6
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_stopped_by_lightning_saves_its_last_step(tmp_path: Path) -> None:
    def stop(module: TinyModule, step: int) -> None:
        module.trainer.should_stop = step == 5

    module = TinyModule(stop)
    fit(module, [checkpoints := Checkpoints(tmp_path, every_n_steps=100)])
    assert step_of(checkpoints.last_path) == 5
    assert module.val_steps[-1] == 5, "Lightning validates before it stops"


def test_a_damaged_last_does_not_replace_the_intact_previous(tmp_path, caplog):
    fit(TinyModule(), [Checkpoints(tmp_path, every_n_steps=4)], max_steps=8)
    last = tmp_path / "last.ckpt"
    (tmp_path / "best.ckpt").unlink()
    last.write_bytes(last.read_bytes()[:-100])
    path = files.newest_intact(tmp_path)
    assert "last.ckpt is damaged" in caplog.text
    assert path is not None and path.name == "previous.ckpt" and step_of(path) == 4

    class DiesInTheFirstSave(Checkpoints):
        def setup(self, trainer, pl_module, stage) -> None:
            def fail(*_args, **_kwargs) -> None:
                raise OSError("disk")

            trainer.save_checkpoint = fail

    with pytest.raises(OSError):
        fit(TinyModule(), [DiesInTheFirstSave(tmp_path, every_n_steps=1)], ckpt_path=path)
    assert step_of(tmp_path / "previous.ckpt") == 4
