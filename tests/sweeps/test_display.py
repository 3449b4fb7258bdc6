"""The display of a running sweep: a table in a terminal, else lines."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from mtp_lightning.run.status import last_words, write_status
from sweeps.display import Display, LiveTable, duration, make_display
from sweeps.process import Job

HEAD = "step,train/loss,val/loss_depth_0"


def csv(folder: Path, *rows: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text("\n".join([HEAD, *rows]))
    return folder


def sweep(tmp_path: Path) -> list[Job]:
    jobs = []
    for i, state in enumerate(("running", "done", "failed")):
        folder = csv(tmp_path / f"job{i}", "10,5.5,", "")
        labels = (f"mtp.depth={i}", "mtp_lambda=[0.1,0.2]")
        reason = "exit code 1: error: [bad] value" if state == "failed" else None
        write_status(folder, labels, state, device="cpu:0", reason=reason)
        jobs.append(Job(folder=folder, overrides=labels, command=(), max_steps=100, labels=labels))
    return jobs


def test_the_live_table_shows_step_loss_and_remaining_time(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True, color_system=None)
    jobs = sweep(tmp_path)
    with LiveTable(3, console=console) as table:
        for job in jobs:
            table.started(job, "cpu:0")
        for job in jobs[1:]:
            table.ended(job)
        table.refresh()  # sees step 10
        clock[0] += 20
        csv(jobs[0].folder, "10,5.5,", "50,4.25,", "")
        table.refresh()
    lines = out.getvalue().splitlines()
    (running,) = [line for line in lines[-8:] if "mtp.depth=0" in line]
    # 40 steps in 20 s: the other 50 take 25 s.
    cells = [cell.strip() for cell in running.strip("│ ").split("│")]
    assert cells[1:] == ["running", "cpu:0", "50/100", "4.250", "0:25"]
    assert cells[0] == "mtp.depth=0 mtp_lambda=[0.1,0.2]"
    assert "2 of 3 ended, 1 running, 1 failed, after 0:20" in out.getvalue()
    text = "\n".join(lines[-8:])
    assert text.index("failed") < text.index("done")


def test_lines_report_starts_ends_and_progress(tmp_path, capsys):
    jobs = sweep(tmp_path)
    with Display(3, seconds=0) as lines:
        for job in jobs:
            lines.started(job, "cuda:1")
        lines.ended(jobs[2])
        lines.refresh()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "started mtp.depth=0 mtp_lambda=[0.1,0.2] on cuda:1"
    assert printed[3].startswith("failed mtp.depth=2") and "error: [bad] value" in printed[3]
    assert printed[3].endswith(f"(log: {jobs[2].folder / 'job.log'})")
    assert printed[4] == "  mtp.depth=0 mtp_lambda=[0.1,0.2]: step 10/100, loss 5.500"
    assert printed[-1].strip() == "1 of 3 ended, 2 running, 1 failed, after 0:00"


def test_the_time_left_is_that_of_jobs_like_those_that_are_done(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    jobs = [Job(folder=csv(tmp_path / f"{i}"), overrides=(), command=()) for i in range(7)]
    display = Display(7)

    def end(job: Job, state: str) -> None:
        write_status(job.folder, (), state)
        display.ended(job)

    for job in jobs[:3]:
        display.started(job, "cpu:0")
    clock[0] = 1.0
    end(jobs[2], "failed")
    clock[0] = 100.0
    assert display.summary().endswith("2 running, 1 failed, after 1:40"), "none is done"
    end(jobs[0], "done")
    display.started(jobs[3], "cpu:0")
    clock[0] = 120.0
    # Jobs take 100 s: the running ones have 0 s and 80 s left, three more wait, two run at once.
    assert display.summary().endswith(", after 2:00, about 3:10 left")
    display.estimates = False  # other workers run some of the jobs
    assert display.summary().endswith(", after 2:00")
    display.estimates = True
    end(jobs[1], "done")
    end(jobs[3], "done")
    assert display.summary().endswith(", after 2:00"), "none runs"


def test_the_time_left_is_at_least_that_of_each_running_job(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    slow, quick, *_ = sweep(tmp_path)
    display = Display(2)
    for job in (slow, quick):
        display.started(job, "cpu:0")
    display.running[slow].look()  # at step 10
    clock[0] = 20.0
    display.ended(quick)
    csv(slow.folder, "10,5.5,", "50,4.25,", "")
    display.running[slow].look()
    assert display.summary().endswith("after 0:20, about 0:25 left"), "40 steps took 20 s"


def test_a_job_without_a_status_is_displayed_as_pending(tmp_path, capsys):
    with Display(1) as lines:
        lines.ended(Job(folder=tmp_path / "a", overrides=(), command=()))
    assert capsys.readouterr().out == "pending a (1 of 1)\n"


def test_without_a_terminal_that_moves_a_cursor_the_display_is_lines(monkeypatch):
    assert type(make_display(1)) is Display
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for terminal, kind in (("xterm", LiveTable), ("dumb", Display)):
        monkeypatch.setenv("TERM", terminal)
        assert type(make_display(1)) is kind


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3700, "1:01:40")])
def test_durations_have_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("step 1\nerror: a bad value\n(HYDRA_FULL_ERROR=1 shows where)\n", "error: a bad value"),
        ("Traceback\n  File\nRuntimeError: broken\n\n", "RuntimeError: broken"),
        ("error: earlier\na\nb\nc\nstep 7", "step 7"),
        ("", "nothing in the log"),
    ],
)
def test_the_last_words_of_a_log_are_its_error_or_last_line(tmp_path, log, words):
    (tmp_path / "job.log").write_text(log)
    assert last_words(tmp_path / "job.log") == words
    assert last_words(tmp_path / "none") == "no log"


def test_a_job_that_another_worker_has_is_no_end(tmp_path: Path, capsys) -> None:
    lines, (job, *_) = Display(2), sweep(tmp_path)
    lines.started(job, "cpu:0")
    lines.left(job)
    assert "left mtp.depth=0" in capsys.readouterr().out
    assert lines.summary().startswith("0 of 2 ended, 0 running")
