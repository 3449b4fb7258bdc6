"""Lightning's own callbacks in a real run, built from conf/callbacks or added to the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.errors import UserError
from sweeps.report.read import read_run
from tests.integration import helpers
from tests.integration.helpers import DDP, column, rows, summary_of, train_here, train_with, typed

# Nothing gets better by that much.
EARLY = typed(
    "callbacks=early_stopping callbacks.early_stopping.min_delta=1000 trainer.val_check_interval=2"
)


@pytest.mark.parametrize("monitor", ["train/loss_depth_2", "val/accuracy_depth_1"])
def test_early_stopping(tmp_path: Path, cache: Path, monitor: str) -> None:

    settings = EARLY | typed(
        f"callbacks.early_stopping.monitor={monitor} callbacks.early_stopping.patience=2 "
        "trainer.max_steps=30"
    )
    summary = train_here(tmp_path, cache, settings)
    assert summary["step"] == 6 and summary["stopped_early"]
    run = read_run(tmp_path)
    assert (run.state, run.reason) == ("done", "")
    before = rows(tmp_path)
    assert train_here(tmp_path, cache, settings)["step"] == 6, "it has ended"
    assert rows(tmp_path) == before
    more = train_here(tmp_path, cache, settings | {"callbacks.early_stopping.patience": 3})
    assert more["step"] == 8


@pytest.mark.parametrize("group", ["early_stopping", "checkpoints"])
def test_a_monitor_that_no_validation_logs(tmp_path: Path, cache: Path, group: str) -> None:
    settings = {"callbacks": "early_stopping", f"callbacks.{group}.monitor": "val/accuracy_depth_9"}
    said = f"callbacks.{group}.monitor=val/accuracy_depth_9 was not logged .* val/accuracy_depth_0?"
    with pytest.raises(UserError, match=said):
        train_here(tmp_path, cache, settings)


@pytest.mark.slow
def test_a_value_of_the_first_process_alone_is_monitored_by_all(tmp_path, cache):
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


def test_a_value_that_is_monitored_is_that_of_the_newest_step(tmp_path, cache, finished):
    """Between two logged steps, too. A callback adds to the summary."""
    seen: dict[int, float] = {}

    class Looks(EarlyStopping):
        def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            seen[trainer.global_step] = float(trainer.callback_metrics["train/loss"])

    class Counts(RunCallback):
        pauses = 0

        def paused(self) -> Any:
            self.pauses += 1
            return super().paused()

        def summary(self) -> dict[str, float]:
            return {"mine/pauses": float(self.pauses)}

    settings = {"trainer.log_every_n_steps": 7}
    train_with(tmp_path, cache, [Looks("train/loss"), Counts()], settings)
    losses = column(finished, "train/loss")
    assert seen == {step: losses[step] for step in (5, 10)}
    assert summary_of(tmp_path)["mine/pauses"] >= 1


def test_learning_rates(tmp_path: Path, cache: Path, finished: Path) -> None:
    train_here(tmp_path, cache, {"callbacks": "[learning_rate,early_stopping]"})
    (tag,) = [tag for tag in rows(tmp_path)[0] if tag.startswith("lr-") and tag.endswith("pg1")]
    logged = column(tmp_path, tag)
    rates = column(tmp_path, "train/lr")
    for step in range(1, 10):  # Lightning's log is float32
        assert logged[step] == pytest.approx(rates[step], rel=1e-6)
    kept = [{t: v for t, v in row.items() if not t.startswith("lr-")} for row in rows(tmp_path)]
    assert [row for row in kept if len(row) > 1] == rows(finished)


def test_model_checkpoint_beside_ours(tmp_path: Path, cache: Path) -> None:
    from mtp_lightning.opening import open_model

    saves = ModelCheckpoint(
        tmp_path / "theirs", "{step}", monitor="val/loss_depth_0", save_top_k=2,
        every_n_train_steps=None, auto_insert_metric_name=False,
    )  # fmt: skip
    train_with(tmp_path / "run", cache, [saves])
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {"5.ckpt", "10.ckpt"}
    assert open_model(saves.best_model_path).step in (5, 10)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    with pytest.warns(UserWarning, match="theirs exists and is not empty"):  # Lightning's word
        train_with(tmp_path / "run", cache, [saves], {"trainer.max_steps": 15})
    assert open_model(saves.last_model_path or saves.best_model_path).step > 0


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["weights", "none"])
def test_what_is_kept_of_a_run_that_has_ended_well(tmp_path, cache, once, kept):
    settings = {"callbacks.checkpoints.every_n_steps": 4, "mtp.depth": 1}
    whole, small = once("kept", lambda f: train_here(f, cache, settings)), tmp_path / "small"
    train_here(small, cache, {**settings, "callbacks.checkpoints.keep": kept})
    assert rows(whole) == rows(small)
    files = {path.name: path.stat().st_size for path in (small / "checkpoints").iterdir()}
    if kept == "none":
        assert files == {}
        told = "kept no checkpoint"
        at = {"callbacks.checkpoints.keep": kept, "callbacks.checkpoints.keep_steps": "[4]"}
        train_here(tmp_path / "step", cache, {**settings, **at})
        with pytest.raises(ValueError, match=told):  # a kept step is not its end
            train_here(tmp_path / "step", cache, {**settings, **at})
    else:
        assert set(files) == {"last.ckpt", "best.ckpt"}
        assert files["last.ckpt"] < 0.6 * (whole / "checkpoints" / "last.ckpt").stat().st_size
        for name in files:
            helpers.assert_equal(helpers.weights(whole, name), helpers.weights(small, name))
        same = [(run / "checkpoints" / name) for run in (whole, small) for name in files]
        assert same[0].samefile(same[1]) == same[2].samefile(same[3])
        told = "holds the weights alone"
        train_here(tmp_path / "next", cache, {**settings, "init_from": small})
    with pytest.raises(ValueError, match=told):
        train_here(small, cache, {**settings, "trainer.max_steps": 20})


def test_floors_of_a_run(tmp_path: Path, cache: Path, finished: Path) -> None:
    sizes = {"n_prompts": 2, "prompt_tokens": 8, "rollouts": 4, "seen": 2}
    settings = {f"callbacks.floor_and_gap.{name}": value for name, value in sizes.items()}
    summary = train_here(tmp_path, cache, {"callbacks": "floor_and_gap", **settings})
    for k, m in ((1, 0), (2, 0), (2, 1)):
        floor, gap = (summary[f"val/{n}_depth_{k}_order_{m}"] for n in ("floor", "gap"))
        assert 0 <= floor <= 1 and gap >= -floor
    a, b = (column(folder, "train/loss") for folder in (tmp_path, finished))
    assert a == b
