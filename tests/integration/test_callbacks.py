"""Lightning's own callbacks in a real run, built from conf/callbacks or added to the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.errors import UserError
from mtp_lightning.experiment.training import train
from sweeps.report.read import read_run
from tests.integration import helpers
from tests.integration.helpers import DDP, column, rows, summary_of, train_here, train_with, typed

# No value improves by that much.
EARLY = typed(
    "callbacks=early_stopping callbacks.early_stopping.min_delta=1000 trainer.val_check_interval=2"
)


@pytest.mark.parametrize("monitor", ["train/loss_depth_2", "val/accuracy_depth_1"])
def test_early_stopping_ends_the_run_and_more_patience_continues_it(tmp_path, cache, monitor):
    settings = EARLY | typed(
        f"callbacks.early_stopping.monitor={monitor} callbacks.early_stopping.patience=2 "
        "trainer.max_steps=30"
    )
    summary = train_here(tmp_path, cache, settings)
    assert summary["step"] == 6 and summary["stopped_early"]
    run = read_run(tmp_path)
    assert (run.state, run.reason) == ("done", "")
    before = rows(tmp_path)
    assert train_here(tmp_path, cache, settings)["step"] == 6
    assert rows(tmp_path) == before
    patient = settings | {"callbacks.early_stopping.patience": 3}
    assert train_here(tmp_path, cache, patient)["step"] == 8


def test_a_run_that_a_threshold_has_ended_trains_no_more(tmp_path, cache):
    settings = typed("callbacks=early_stopping trainer.val_check_interval=2 trainer.max_steps=20")
    key = "+callbacks.early_stopping.stopping_threshold"

    def step(threshold: float, **more: Any) -> int:
        return int(train_here(tmp_path, cache, {**settings, key: threshold, **more})["step"])

    assert step(99.0) == 2
    before = rows(tmp_path)
    assert step(99.0) == 2 and rows(tmp_path) == before
    assert step(0.5, **{"trainer.max_steps": 4}) == 4, "another threshold continues the run"
    assert step(0.5, **{"trainer.max_steps": 6}) == 6, "the first end is not remembered"


def test_a_stop_that_min_steps_delays_changes_no_checkpoint(tmp_path, cache, monkeypatch):
    saved: list[int] = []
    monkeypatch.setattr(Checkpoints, "_save", lambda self, t: saved.append(t.global_step))
    settings = EARLY | typed(
        "callbacks.early_stopping.patience=1 callbacks.checkpoints.monitor=null "
        "trainer.val_check_interval=4 callbacks.checkpoints.every_n_steps=6 "
        "trainer.max_steps=20 +trainer.min_steps=20"
    )
    assert train_here(tmp_path, cache, settings)["step"] == 20
    assert saved == [6, 12, 18, 20, 20]  # the last one is that of on_train_end


def test_a_callback_that_lightning_refuses_is_one_sentence(tmp_path, cache):
    target = "+callbacks.averaging._target_"
    settings = typed(f"{target}=lightning.pytorch.callbacks.StochasticWeightAveraging")
    with pytest.raises(UserError, match="Lightning refuses .*swa_epoch_start.*leave it out"):
        train_here(tmp_path, cache, {**settings, "+callbacks.averaging.swa_lrs": 0.01})


@pytest.mark.parametrize("group", ["early_stopping", "checkpoints"])
def test_a_monitor_that_is_not_logged_is_refused(tmp_path: Path, cache: Path, group: str) -> None:
    settings = {"callbacks": "early_stopping", f"callbacks.{group}.monitor": "val/accuracy_depth_9"}
    with pytest.raises(UserError, match=rf"callbacks.{group}.monitor=.* was not logged .*depth_0?"):
        train_here(tmp_path, cache, settings)


@pytest.mark.slow
def test_all_processes_monitor_a_value_of_the_first_process(tmp_path, cache):
    tag = "decode/tokens_per_step"
    settings = typed(
        f"callbacks.early_stopping.monitor={tag} callbacks.checkpoints.monitor={tag} "
        "callbacks.early_stopping.patience=1 data.seq_len=32 "
        "callbacks.speculative_eval.new_tokens=8 callbacks.speculative_eval.n_prompts=2"
    )
    assert "Warning" not in helpers.train_apart(tmp_path, cache, DDP | EARLY | settings).stderr
    assert summary_of(tmp_path)["step"] == 4 and (tmp_path / "checkpoints" / "best.ckpt").exists()


def test_a_finished_run_that_is_started_again_keeps_its_speed(tmp_path: Path, cache: Path) -> None:
    settings = {"callbacks.throughput.measure_matmul": True}
    before = train_here(tmp_path, cache, settings)
    after = train_here(tmp_path, cache, settings)
    for tag in ("perf/tokens_per_second", "perf/of_matmul", "perf/matmul_drift"):
        assert after[tag] == before[tag] > 0


def test_a_finished_run_that_is_started_again_removes_its_own_checkpoints(
    tmp_path, cache, monkeypatch
):
    train_here(tmp_path / "run", cache)
    (tmp_path / "checkpoints").mkdir()
    other = tmp_path / "checkpoints" / "last.ckpt"  # of a run in the current directory
    other.touch()
    monkeypatch.chdir(tmp_path)
    train_here(tmp_path / "run", cache, {"callbacks.checkpoints.keep": "none"})
    assert other.exists() and not any((tmp_path / "run" / "checkpoints").iterdir())


def test_without_the_callback_no_checkpoint_is_written(tmp_path: Path, cache: Path) -> None:
    cfg = helpers.config(tmp_path, cache)
    del cfg.callbacks.checkpoints
    assert train(cfg)["step"] == 10 and not list(tmp_path.rglob("*.ckpt"))


def test_monitored_values_are_of_the_newest_step(tmp_path, cache, finished):
    """Also between two logged steps; and a callback adds values to the summary."""
    monitored: dict[int, float] = {}

    class Watching(EarlyStopping):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            monitored[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    class Counting(RunCallback):
        pauses = 0

        def paused(self) -> Any:
            self.pauses += 1
            return super().paused()

        def summary(self) -> dict[str, float]:
            return {"counted/pauses": float(self.pauses)}

    settings = {"trainer.log_every_n_steps": 7}
    train_with(tmp_path, cache, [Watching("train/loss"), Counting()], settings)
    losses = column(finished, "train/loss")
    assert monitored == {step: losses[step] for step in (5, 10)}
    assert summary_of(tmp_path)["counted/pauses"] >= 1


def test_the_learning_rate_monitor_logs_the_rates_and_changes_no_loss(tmp_path, cache, finished):
    train_here(tmp_path, cache, {"callbacks": "[learning_rate,early_stopping]"})
    (tag,) = [tag for tag in rows(tmp_path)[0] if tag.startswith("lr-") and tag.endswith("pg1")]
    logged = column(tmp_path, tag)
    rates = column(tmp_path, "train/lr")
    for step in range(1, 10):  # Lightning's log is float32
        assert logged[step] == pytest.approx(rates[step], rel=1e-6)
    others = [{t: v for t, v in row.items() if not t.startswith("lr-")} for row in rows(tmp_path)]
    assert [row for row in others if len(row) > 1] == rows(finished)


def test_lightnings_model_checkpoint_works_next_to_ours(tmp_path: Path, cache: Path) -> None:
    from mtp_lightning.opening import open_model

    theirs = ModelCheckpoint(
        tmp_path / "theirs", "{step}", monitor="val/loss_depth_0", save_top_k=2,
        every_n_train_steps=None, auto_insert_metric_name=False,
    )  # fmt: skip
    train_with(tmp_path / "run", cache, [theirs])
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"5.ckpt", "10.ckpt"}
    assert open_model(theirs.best_model_path).step in (5, 10)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    with pytest.warns(UserWarning, match="theirs exists and is not empty"):  # by Lightning
        train_with(tmp_path / "run", cache, [theirs], {"trainer.max_steps": 15})
    assert open_model(theirs.last_model_path or theirs.best_model_path).step > 0


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["weights", "none"])
def test_keep_decides_what_a_finished_run_leaves(tmp_path, cache, once, keep):
    settings = {"callbacks.checkpoints.every_n_steps": 4, "mtp.depth": 1}
    full, small = once("keep-all", lambda f: train_here(f, cache, settings)), tmp_path / "small"
    train_here(small, cache, {**settings, "callbacks.checkpoints.keep": keep})
    assert rows(full) == rows(small)
    files = {path.name: path.stat().st_size for path in (small / "checkpoints").iterdir()}
    if keep == "none":
        assert files == {}
        message = "kept no checkpoint"
        keep_step = {"callbacks.checkpoints.keep": keep, "callbacks.checkpoints.keep_steps": "[4]"}
        train_here(tmp_path / "step", cache, {**settings, **keep_step})
        with pytest.raises(ValueError, match=message):  # a kept step is not its end
            train_here(tmp_path / "step", cache, {**settings, **keep_step})
    else:
        assert set(files) == {"last.ckpt", "best.ckpt"}
        assert files["last.ckpt"] < 0.6 * (full / "checkpoints" / "last.ckpt").stat().st_size
        for name in files:
            helpers.assert_equal(helpers.weights(full, name), helpers.weights(small, name))
        same = [(run / "checkpoints" / name) for run in (full, small) for name in files]
        assert same[0].samefile(same[1]) == same[2].samefile(same[3])
        message = "holds the weights alone"
        train_here(tmp_path / "next", cache, {**settings, "init_from": small})
    with pytest.raises(ValueError, match=message):
        train_here(small, cache, {**settings, "trainer.max_steps": 20})


def test_floor_and_gap_are_measured_and_change_no_loss(tmp_path, cache, finished):
    sizes = {"n_prompts": 2, "prompt_tokens": 8, "rollouts": 4, "seen": 2}
    settings = {f"callbacks.floor_and_gap.{name}": value for name, value in sizes.items()}
    summary = train_here(tmp_path, cache, {"callbacks": "floor_and_gap", **settings})
    for k, m in ((1, 0), (2, 0), (2, 1)):
        floor, gap = (summary[f"val/{n}_depth_{k}_order_{m}"] for n in ("floor", "gap"))
        assert 0 <= floor <= 1 and 0 <= floor + gap <= 1  # the rejection rate
    a, b = (column(folder, "train/loss") for folder in (tmp_path, finished))
    assert a == b
