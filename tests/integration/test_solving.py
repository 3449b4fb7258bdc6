"""Runs that stop when their task is solved, and the reported time to solve."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mtp_lightning.experiment.training import train
from mtp_lightning.run.status import state_of
from mtp_lightning.run.summary import environment
from sweeps.report.compare import wait_of
from sweeps.report.read import read_run
from sweeps.report.statistics import Wait
from tests.integration import helpers
from tests.integration.conftest import Once
from tests.integration.helpers import DDP, TASK, execute, rows, summary_of, train_apart, train_here

# One letter, one place: solved as soon as its answer is the likeliest of all symbols.
EASY: dict[str, Any] = {
    **TASK, "data.task.letters": 1, "data.task.periods": 1, "data.task.held_out": "null",
    "data.eval_examples": 20, "mtp.depth": 1, "optimizer.lr": 0.001,
    "callbacks": "[stop_when_solved]", "callbacks.checkpoints.every_n_steps": 5,
    "trainer.max_steps": 60,
}  # fmt: skip
COST = ("tokens", "flops", "seconds")


def exact_matches(folder: Path) -> dict[int, float]:
    return {int(r["step"]): r["val/exact_match"] for r in rows(folder) if "val/exact_match" in r}


def stops_at(matches: dict[int, float], level: float = 0.98, count: int = 2) -> int | None:
    """The step of the first ``count`` validations in a row above the level, by hand."""
    steps = sorted(matches)
    for i in range(count - 1, len(steps)):
        if all(matches[step] > level for step in steps[i - count + 1 : i + 1]):
            return steps[i]
    return None


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without speeds and the environment."""
    timed = ("perf/", "decode/speedup", "decode/tokens_per_second")
    here = environment(torch.device("cpu"))
    return {k: v for k, v in summary.items() if not k.startswith(timed) and k not in here}


@pytest.fixture(scope="module")
def solved(once: Once, cache: Path) -> Path:
    return once("solved", lambda folder: train_here(folder, cache, EASY))


def test_a_solved_run_stops_and_reports_its_cost(tmp_path, cache, solved):
    shutil.copytree(solved, tmp_path, dirs_exist_ok=True)
    summary = summary_of(tmp_path)
    step = summary["step"]
    assert step == stops_at(exact_matches(tmp_path)) and 10 <= step < 60
    assert summary["solved"] is True and summary["stopped_early"] is True
    assert summary["solved_at"] == {"step": step} | {name: summary[name] for name in COST}
    first = min(s for s, right in exact_matches(tmp_path).items() if right > 0.95)
    row = next(r for r in rows(tmp_path, timing=True) if r["step"] == first)
    spent = {name: pytest.approx(row[f"progress/{name}"]) for name in COST}
    assert summary["time_to_solve"] == {"step": first} | spent
    assert 0 < summary["time_to_solve"]["tokens"] < summary["tokens"]
    # The report, too, takes it as done, with the FLOPs that it used.
    run = read_run(tmp_path)
    assert (run.state, run.reason) == ("done", "") and run.final("flops") == summary["flops"]
    assert wait_of(run, 0.95) == Wait(first, True)
    # Started again, it does not train and reports the same.
    before, weights_before = rows(tmp_path), (tmp_path / "checkpoints/last.ckpt").read_bytes()
    again = train_here(tmp_path, cache, EASY)
    assert rows(tmp_path) == before
    assert (tmp_path / "checkpoints/last.ckpt").read_bytes() == weights_before
    assert without_times(again) == without_times(summary) == without_times(summary_of(tmp_path))
    # With a higher count, the run continues.
    more = train_here(tmp_path, cache, EASY | {"callbacks.stop_when_solved.validations": 4})
    assert more["step"] > step and more["solved"]


def test_an_interruption_between_two_validations_changes_nothing(tmp_path, cache, solved):
    summary, again = summary_of(solved), tmp_path / "again"
    helpers.as_it_was_before(solved, again)
    resumed = train_here(again, cache, EASY)
    helpers.assert_same_run(solved, again)
    assert resumed["step"] == summary["step"]
    for key in ("solved_at", "time_to_solve"):
        assert {**resumed[key], "seconds": 0} == {**summary[key], "seconds": 0}


def test_an_unsolved_run_reports_null(tmp_path: Path, cache: Path) -> None:
    hard = {"data.task.letters": 26, "data.task.periods": 9, "trainer.max_steps": 10}
    summary = train_here(tmp_path, cache, EASY | hard)
    assert summary["solved"] is False and "stopped_early" not in summary
    assert summary["solved_at"] is None and summary["time_to_solve"] is None
    assert summary_of(tmp_path)["time_to_solve"] is None
    assert wait_of(read_run(tmp_path), 0.95) == Wait(10, False)


def test_the_validation_after_the_last_step_counts(tmp_path, cache, solved):
    """The interval does not divide the number of steps."""
    step = summary_of(solved)["step"]
    constant = helpers.typed("lambda_schedule=constant optimizer.schedule.kind=constant")
    late = constant | {"trainer.max_steps": step - 2}
    summary = train_here(tmp_path / "late", cache, EASY | late)
    matches = exact_matches(tmp_path / "late")
    assert max(matches) == step - 2 and matches[step - 2] > 0.98
    assert summary["solved"] is (stops_at(matches) is not None)
    again = train_here(tmp_path / "late", cache, EASY | late)
    assert exact_matches(tmp_path / "late") == matches
    assert without_times(again) == without_times(summary)


def test_time_to_solve_is_reported_without_the_callback(tmp_path, cache, finished):
    plain = {"callbacks": None, "trainer.max_steps": 25}
    summary = train_here(tmp_path, cache, EASY | plain)
    first = min(s for s, right in exact_matches(tmp_path).items() if right > 0.95)
    assert summary["time_to_solve"]["step"] == first and summary["step"] == 25
    assert "solved" not in summary
    shutil.move(tmp_path / "checkpoints" / "previous.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    again = train_here(tmp_path, cache, EASY | plain)
    assert {**again["time_to_solve"], "seconds": 0} == {**summary["time_to_solve"], "seconds": 0}
    assert "time_to_solve" not in summary_of(finished), "a text is not a task"


def test_stop_when_solved_needs_exact_match(tmp_path: Path, cache: Path) -> None:
    cfg = helpers.config(tmp_path, cache, EASY)
    del cfg.callbacks.exact_match
    with pytest.raises(ValueError, match="which no callback logs here: add exact_match"):
        train(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("restart", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_processes_stop_together(tmp_path: Path, cache: Path, restart: bool) -> None:
    common = EASY | {"trainer.precision": "64-true"}
    two = DDP | {"data.batch_size": 2}
    train_apart(tmp_path / "two", cache, common | two)
    alone, together = train_here(tmp_path / "one", cache, common), summary_of(tmp_path / "two")
    for key in ("solved_at", "time_to_solve"):
        assert {**together[key], "seconds": 0} == {**alone[key], "seconds": 0}
    if restart:
        train_apart(tmp_path / "two", cache, common | two)
        assert summary_of(tmp_path / "two")["solved_at"] == together["solved_at"]


def test_a_matched_run_counts_the_flops_that_it_used(tmp_path: Path, cache: Path) -> None:
    """As the matched run and as the reference of another run."""
    summary = train_here(tmp_path / "a", cache, EASY | {"compare.match": "flops"})
    compared = summary["compare"]
    assert compared["reached"] == summary["flops"] < 0.9 * compared["target"]
    assert compared["remaining"] == pytest.approx(summary["flops"] / compared["target"] - 1)
    other = {"compare.match": "flops", "compare.reference": tmp_path / "a", "callbacks": None}
    matched = train_here(tmp_path / "b", cache, EASY | other)
    assert matched["compare"]["target"] == summary["flops"]
    assert matched["flops"] == pytest.approx(summary["flops"], rel=0.05)


@pytest.mark.slow
def test_a_sweep_counts_a_solved_run_as_done(tmp_path: Path, cache: Path) -> None:
    python, app, *overrides, _ = helpers.command(tmp_path / "unused", cache, EASY)
    args = [python, app, "-m", *overrides, f"sweep_dir={tmp_path / 's'}", "seed=0,1"]
    output = execute(args, code=0).stdout
    assert "2 jobs done" in output and f"python -m sweeps.report {tmp_path / 's'}" in output
    folders = [path for path in (tmp_path / "s").iterdir() if (path / "config.yaml").exists()]
    assert [state_of(folder) for folder in folders] == ["done", "done"]
    assert all(summary_of(folder)["solved"] for folder in folders)
    assert "2 done before" in execute(args, code=0).stdout
