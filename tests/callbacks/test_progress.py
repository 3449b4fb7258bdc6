"""The progress bar shows steps and every depth's loss, and plain lines outside a
terminal."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import pytest
from tiny_run import TinyModule, fit

from mtp_lightning.callbacks.base import RunCallback
from mtp_lightning.callbacks.checkpoints import Checkpoints
from mtp_lightning.callbacks.progress import StepProgressBar, with_bar
from mtp_lightning.command_line.shell import QUIET
from mtp_lightning.objective.schedule import published


def on_a_terminal(monkeypatch) -> StepProgressBar:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    return StepProgressBar(refresh_seconds=0.0)


def lines_of(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith("step ")]


def test_the_bar_counts_steps_of_the_whole_run(capsys, monkeypatch, tmp_path: Path) -> None:
    module = TinyModule()
    callbacks = [on_a_terminal(monkeypatch), Checkpoints(tmp_path, every_n_steps=12)]
    fit(module, callbacks, epoch_steps=8)
    shown = capsys.readouterr().err
    last = module.losses[12]
    assert f"L0 {last[0]:.2f}  L1 {last[1]:.2f}  lambda 0.3" in shown
    assert re.search(r"validating [123]/3", shown)
    assert re.search(r"step 4  validation  L0 \d+\.\d{3}  L1 \d+\.\d{3}", shown)
    drawn = {int(m[1]): " left" in m[0] for m in re.finditer(r"\| *(\d+)/12 \[[^\]]*\]", shown)}
    assert {1, 12} <= drawn.keys()
    assert drawn[9] is False and drawn[10] is True, "the remaining time"

    fit(TinyModule(), [on_a_terminal(monkeypatch)], max_steps=15, ckpt_path=tmp_path / "last.ckpt")
    resumed = capsys.readouterr().err
    assert "12/15" in resumed and "15/15" in resumed
    assert "| 1/15" not in resumed


def test_lines_where_stderr_is_not_a_terminal(capsys) -> None:
    module = TinyModule()
    fit(module, [StepProgressBar(line_seconds=0.0)], max_steps=12, val_every=100)
    captured = capsys.readouterr()
    lines = lines_of(captured.err)
    assert [line.split()[1] for line in lines] == [f"{step}/12" for step in range(1, 13)]
    assert f"L0 {module.losses[5][0]:.2f}  L1 {module.losses[5][1]:.2f}  lambda 0.3" in lines[4]
    assert "\r" not in captured.err and captured.out == ""
    timed = [bool(re.search(r"  \d+ s left$", line)) for line in lines]
    assert timed == [False] * 9 + [True, True, False]


def test_the_remaining_time_is_shown_from_the_tenth_step() -> None:
    progress = StepProgressBar()
    progress._began = (100, 1000.0)
    remaining = progress._remaining_time
    assert remaining(109, 350, 1009.0) == "" != remaining(110, 350, 1010.0)
    assert remaining(150, 350, 1050.0) == "3 min left"  # 200 steps of a second each
    assert remaining(150, 180, 1050.0) == "30 s left"
    assert remaining(100, 350, 1000.0) == remaining(350, 350, 1250.0) == ""


def test_a_schedule_that_changes_lambda_is_named(capsys) -> None:
    module = TinyModule()
    for name, line in (("deepseek_v3", "lambda 0.3 (deepseek_v3)\n"), ("constant", "lambda 0.3\n")):
        module.schedule = getattr(published, name)(1, 0.3)
        module.schedule.name = name
        fit(module, [StepProgressBar()], max_steps=2, val_every=100)
        assert line in capsys.readouterr().err


def test_lines_are_printed_by_time(capsys, monkeypatch) -> None:
    # The clock of a machine that was started seconds ago.
    began = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda now=time.monotonic: now() - began)
    fit(TinyModule(), [StepProgressBar(line_seconds=1000.0)], max_steps=12, val_every=100)
    lines = lines_of(capsys.readouterr().err)
    assert [line.split()[1] for line in lines] == ["1/12", "12/12"]


def test_an_inactive_depth_is_a_dash(capsys) -> None:
    class Skips(TinyModule):
        def training_step(self, batch, batch_idx):
            outputs = super().training_step(batch, batch_idx)
            return {**outputs, "computed": [True, False], "factors": [0.0]}

    fit(Skips(), [StepProgressBar()], max_steps=2, val_every=100)
    assert re.search(r"step 2/2  L0 \d+\.\d\d  L1 -  lambda 0$", capsys.readouterr().err, re.M)


def test_other_callbacks_add_to_the_line(capsys) -> None:
    progress = StepProgressBar()

    class Shows(RunCallback):
        def shown(self) -> str:
            return "12.3k tok/s"

    fit(TinyModule(), [progress, Shows(), RunCallback()], max_steps=2, val_every=100)
    assert "lambda 0.3  12.3k tok/s\n" in capsys.readouterr().err
    progress.disable()
    fit(TinyModule(), [progress], max_steps=2)
    assert "step" not in capsys.readouterr().err


def test_the_bar_is_closed_on_an_error(capsys, monkeypatch) -> None:
    def fail(module: TinyModule, step: int) -> None:
        if step == 3:
            raise RuntimeError("broken")

    bar = on_a_terminal(monkeypatch)
    with pytest.raises(RuntimeError):
        fit(TinyModule(fail), [bar])
    assert bar._bar is None
    assert "3/12" in capsys.readouterr().err


def test_batches_are_counted_on_a_terminal_alone(capsys, monkeypatch) -> None:
    assert list(with_bar(range(3), "evaluate")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(with_bar(range(3), "evaluate")) == [0, 1, 2]
    assert re.search(r"evaluate: .*\| 0/3 ", capsys.readouterr().err)
    monkeypatch.setenv(QUIET, "1")
    assert list(with_bar(range(3), "evaluate")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
