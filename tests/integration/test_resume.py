"""A run that was killed, interrupted or damaged continues as though nothing had happened."""

from __future__ import annotations

import csv
import functools
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.command_line.shell import Stopped
from mtp_lightning.errors import UserError
from mtp_lightning.module import MTPModule
from mtp_lightning.nn import ops
from mtp_lightning.run.config import read_yaml
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import assert_same_run, checkpoint, column, command, rows, train_here

STEPS, EVERY = 150, 20

# Schedules that change at every step, validations between checkpoints, and an epoch that ends: 8 kB
# are about 110 batches of 4 windows of 16 tokens.
LONG = {
    "data.source.size": 8_000, "data.source.documents": 20, "lambda_schedule": "linear_decay",
    "trainer.max_steps": STEPS, "trainer.val_check_interval": 35,
    "callbacks.checkpoints.every_n_steps": EVERY,
}  # fmt: skip


# The same in a sixth of the steps; an epoch is 21 batches.
SHORT = {
    **LONG, "data.source.size": 1_500, "data.source.documents": 10, "trainer.max_steps": 26,
    "trainer.val_check_interval": 17, "callbacks.checkpoints.every_n_steps": 7,
}  # fmt: skip


@pytest.fixture(scope="module")
def short(once: Once, cache: Path) -> Path:
    """The short run, uninterrupted."""
    return once("short", lambda folder: train_here(folder, cache, SHORT))


@pytest.fixture(scope="module")
def whole(once: Once, cache: Path) -> Path:
    """The long run, uninterrupted."""
    return once("whole", lambda folder: train_here(folder, cache, LONG))


@pytest.fixture(scope="module")
def killed(once: Once, cache: Path) -> Path:
    """A run that was killed in the middle, after its second start."""

    def make(folder: Path) -> None:
        settings = LONG | {"logger": "default", "logger.tensorboard.flush_secs": 0.05}
        helpers.kill_at(command(folder, cache, settings), folder, 47)
        step, logged = checkpoint(folder)["global_step"], max(column(folder, "train/loss"))
        assert step in range(EVERY, STEPS, EVERY) and 46 <= logged < STEPS
        # Steps after the checkpoint were lost and are repeated; else the tests show little.
        assert logged != step
        done = helpers.train_apart(folder, cache, settings)
        assert f"from step {step}" in done.stderr + done.stdout

    return once("killed", make)


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(killed: Path, whole: Path) -> None:
    assert [row["step"] for row in rows(killed)] == list(range(1, STEPS + 1))
    assert_same_run(killed, whole)
    helpers.assert_equal(helpers.weights(killed, "best.ckpt"), helpers.weights(whole, "best.ckpt"))
    for tag in ("train/lr", "train/lambda_depth_1", "train/lambda_depth_2"):
        values = set(column(killed, tag).values())
        assert len(values) > STEPS // 2, f"{tag} hardly changes: the test shows nothing"
    one, other = (checkpoint(folder)["progress"] for folder in (killed, whole))
    assert one["tokens"] == other["tokens"] == STEPS * 4 * 16
    assert one["flops"] == other["flops"] > 0
    with (killed / "metrics.csv").open() as file:
        table = list(csv.reader(file))
    assert {len(row) for row in table} == {len(table[0])} and len(table) == STEPS + 1, "torn rows"


@pytest.mark.slow
def test_tensorboard_events_have_no_step_twice(killed: Path) -> None:
    """As TensorBoard itself reads the folder, with the events of both processes."""
    assert len(list(killed.glob("events.out.tfevents.*"))) >= 2
    logged = helpers.events(killed)
    shared = set(logged.Tags()["scalars"]) & set(rows(killed)[-1])
    assert "train/loss_depth_2" in shared and "val/loss_depth_0" in shared
    for tag in shared - {"step"}:
        scalars = {event.step: event.value for event in logged.Scalars(tag)}
        assert len(logged.Scalars(tag)) == len(scalars), f"double steps of {tag}"
        assert scalars == pytest.approx(column(killed, tag), rel=1e-6)


@pytest.mark.slow
def test_workers_do_not_change_a_resumed_run(tmp_path: Path, cache: Path, short: Path) -> None:
    """Workers fetch batches ahead, which do not count as consumed."""
    workers = {"data.num_workers": 2}
    helpers.stop_after(tmp_path, cache, SHORT | workers, 17)
    assert checkpoint(tmp_path)["global_step"] == 17
    train_here(tmp_path, cache, SHORT | workers)
    assert_same_run(tmp_path, short)


def test_a_finished_run_started_again_trains_no_more(tmp_path, cache, copied):
    first = helpers.summary_of(tmp_path)
    before = rows(tmp_path)
    again = train_here(tmp_path, cache)
    assert rows(tmp_path) == before
    for key in ("tokens", "flops", "step", "val/loss_depth_0", "val/bits_per_byte"):
        assert again[key] == first[key], key
    assert "changed" not in again
    longer = train_here(tmp_path, cache, {"trainer.max_steps": 12})
    assert longer["step"] == 12 and [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert longer["changed"] == ["at step 10: trainer.max_steps: 10 -> 12"]
    fewer = train_here(tmp_path, cache, {"trainer.max_steps": 5})
    assert fewer["step"] == 12 and read_yaml(tmp_path / "config.yaml")["trainer"]["max_steps"] == 12
    stored = read_yaml(tmp_path / "config.yaml")
    for change, shown in (
        ({"seed": 1}, "seed: 0 -> 1"),
        ({"trainer.gradient_clip_val": 2.0}, "trainer.gradient_clip_val: 1.0 -> 2.0"),
        ({"data.batch_size": 8}, "data.batch_size: 4 -> 8"),
    ):
        refused = rf"has all its 12 steps.*\({shown}\): start in another"
        with pytest.raises(UserError, match=refused):
            train_here(tmp_path, cache, {"trainer.max_steps": 12, **change})
    with pytest.raises(UserError, match="saved on .* training windows of 16 tokens"):
        train_here(tmp_path, cache, {"trainer.max_steps": 13, "data.train_windows": 100})
    assert read_yaml(tmp_path / "config.yaml") == stored, "a refused start changed it"
    assert stored["seed"] == helpers.summary_of(tmp_path)["seed"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_a_run_resumes_exactly_in_other_precisions(tmp_path, cache, precision):
    settings = {**SHORT, "trainer.precision": precision}
    train_here(tmp_path / "whole", cache, settings)
    helpers.resume_from_previous(tmp_path / "whole", tmp_path / "again", cache, settings)


@pytest.mark.slow
def test_a_damaged_last_checkpoint_resumes_from_the_previous_one(tmp_path, cache, short, caplog):
    helpers.stop_after(tmp_path, cache, SHORT, 17)
    last = tmp_path / "checkpoints" / "last.ckpt"
    previous = checkpoint(tmp_path, "previous.ckpt")["global_step"]
    assert 0 < previous < checkpoint(tmp_path)["global_step"] == 17
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.unlink()  # previous.ckpt and best.ckpt may be links to the same file
    last.write_bytes(content)
    train_here(tmp_path, cache, SHORT)
    warnings = [message for message in caplog.messages if "damaged" in message]
    assert len(warnings) == 1 and str(last) in warnings[0]
    assert_same_run(tmp_path, short)


@pytest.mark.slow
def test_ctrl_c_saves_the_step_and_the_run_resumes(tmp_path, cache, whole):
    args = command(tmp_path, cache, LONG)
    process = helpers.start(args, tmp_path / "first.log")
    helpers.wait_for_step(process, tmp_path, 30)
    process.send_signal(signal.SIGINT)
    code = process.wait(240)
    log = (tmp_path / "first.log").read_text()
    assert code == 130, log
    step = checkpoint(tmp_path)["global_step"]
    assert 30 <= step < STEPS
    assert "Traceback" not in log
    assert "interrupted" in log and str(step) in log.split("interrupted")[1]
    # Nothing is lost: the newest row is that of the checkpoint.
    assert max(column(tmp_path, "train/loss")) == step
    train_here(tmp_path, cache, LONG)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_a_closed_terminal_saves_the_step(tmp_path, cache):
    """The run's output then fails, too."""
    ours, theirs = os.openpty()
    rarely = {"callbacks.progress.refresh_seconds": 5}  # nobody reads the terminal: it could fill
    args = ["setsid", "--ctty", "--wait", *command(tmp_path, cache, LONG | rarely)]
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    # The tests themselves may run under nohup, which ignores the signal.
    heard = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    process = subprocess.Popen(
        args, env=helpers.environment(), cwd=helpers.ROOT, preexec_fn=heard, **streams
    )
    os.close(theirs)
    helpers.wait_for_step(process, tmp_path, 30)
    os.close(ours)
    assert process.wait(240) == 128 + signal.SIGTERM
    assert 30 <= checkpoint(tmp_path)["global_step"] < STEPS
    assert max(column(tmp_path, "train/loss")) == checkpoint(tmp_path)["global_step"]


@pytest.fixture
def signals() -> Iterator[None]:
    """The signal handlers of a program, and afterwards those of pytest."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_a_signal_after_logging_stops_after_the_next_step(tmp_path, cache, short, monkeypatch):
    """It comes too late to save its own step."""
    from mtp_lightning.loggers.csv import MetricsCSV

    log_metrics = MetricsCSV.log_metrics

    def log_and_kill(self: MetricsCSV, metrics: Any, step: int | None = None) -> None:
        log_metrics(self, metrics, step)
        if step == 12 and "train/loss" in metrics:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(MetricsCSV, "log_metrics", log_and_kill)
        train_here(tmp_path, cache, SHORT)
    step = checkpoint(tmp_path)["global_step"]
    assert stopped.value.signum == signal.SIGINT and f"step {step} is saved:" in str(stopped.value)
    assert step == 13
    train_here(tmp_path, cache, SHORT)
    assert_same_run(tmp_path, short)


@pytest.mark.usefixtures("signals")
def test_sigterm_in_a_step_before_a_validation_keeps_the_validation(
    tmp_path, cache, short, monkeypatch
):
    """Lightning alone would skip the validation, and the resumed run would miss it."""
    step_of = MTPModule.training_step

    def step_and_kill(self: MTPModule, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 16:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_of(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 17 is saved:"):
        patch.setattr(MTPModule, "training_step", step_and_kill)
        train_here(tmp_path, cache, SHORT)
    train_here(tmp_path, cache, SHORT)
    assert_same_run(tmp_path, short)


def test_an_interrupt_in_the_last_validation_keeps_the_checkpoint(tmp_path, cache, monkeypatch):
    def interrupted(self: MTPModule, *_: Any) -> None:
        raise KeyboardInterrupt

    short = {**SHORT, "trainer.max_steps": 4}
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="step 4 is saved:"):
        patch.setattr(MTPModule, "validation_step", interrupted)
        train_here(tmp_path, cache, short)
    assert train_here(tmp_path, cache, short)["step"] == 4


def test_a_kill_right_after_a_save_loses_no_row(tmp_path, cache, short, monkeypatch):
    """At the end of an epoch; the saved step is not repeated, so its row must be there."""
    from mtp_lightning.callbacks.checkpoints import Checkpoints

    save = Checkpoints._save

    def save_and_die(self: Checkpoints, trainer: Any) -> None:
        save(self, trainer)
        if trainer.global_step == 21:
            raise KeyError("killed")

    with monkeypatch.context() as patch, pytest.raises(KeyError, match="killed"):
        patch.setattr(Checkpoints, "_save", save_and_die)
        train_here(tmp_path, cache, SHORT)
    stored = checkpoint(tmp_path)
    assert stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"]
    assert stored["global_step"] == 21
    train_here(tmp_path, cache, SHORT)
    assert_same_run(tmp_path, short)


@pytest.mark.long
@pytest.mark.parametrize("step", [1, 21, 35, 36, 71, 120])
def test_killed_at_any_step(tmp_path: Path, cache: Path, whole: Path, step: int) -> None:
    helpers.kill_at(command(tmp_path, cache, LONG), tmp_path, step)
    train_here(tmp_path, cache, LONG)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_resume_warns_about_another_number_of_threads(tmp_path, cache, caplog):
    train_here(tmp_path, cache, {"trainer.max_steps": 1})
    assert checkpoint(tmp_path)["threads"] == 1
    train_here(tmp_path, cache, {"trainer.max_steps": 2})
    assert "CPU threads" not in caplog.text
    try:
        train_here(tmp_path, cache, {"trainer.max_steps": 3, "trainer.num_threads": 2})
    finally:
        torch.set_num_threads(1)
    assert "trained with 1 CPU threads and continues with 2" in caplog.text
    assert "trainer.num_threads=1 would give the same bits" in caplog.text
    assert checkpoint(tmp_path)["threads"] == 2


def test_resume_warns_about_other_kernels(tmp_path, cache, caplog, monkeypatch):
    """A run that began with the layers' C++ code, and one that began without."""
    remedy = "MTP_LIGHTNING_NATIVE=0 would give the same bits"
    for step, (code, warning) in enumerate(
        [
            (("native", "C++"), ""),
            (("pytorch", "PyTorch"), "with the same instructions, would give the same bits"),
            (("native", "C++"), remedy),
            (("plain", "PyTorch"), ""),  # without the optional part cpu/
            (("native_avx2", "C++"), remedy),
        ],
        start=1,
    ):
        caplog.clear()
        monkeypatch.setattr(ops, "code", lambda code=code: code)
        train_here(tmp_path, cache, {"trainer.max_steps": step})
        assert warning in caplog.text and checkpoint(tmp_path)["cpu_kernels"] == code[0]
        if code[0] == "pytorch":
            change = "trained with the native layers and continues with the pytorch ones"
            assert change in caplog.text
