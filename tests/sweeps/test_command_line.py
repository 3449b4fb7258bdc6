"""Real sweeps, as they are typed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, rows, start, summary_of, train_here
from tests.sweeps.typed import command, execute, plan, states, wait_until


@pytest.mark.slow
def test_two_by_two_killed_in_the_middle_and_resumed(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "it's a sweep"
    settings = {
        "mtp.depth": "0,1", "seed": "0,1", "trainer.max_steps": 120,
        "trainer.val_check_interval": 120, "callbacks.checkpoints.every_n_steps": 10,
    }  # fmt: skip
    args = command(folder, cache, settings)
    process = start(args, tmp_path / "log", cwd=tmp_path)

    def in_the_middle() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return any(job.joinpath("checkpoints/last.ckpt").exists() for job in _jobs(folder))

    try:
        wait_until(in_the_middle)
    finally:
        process.kill()
        process.wait()
    before = states(folder)
    assert len(before) == 4 and "done" not in before.values()
    assert "running" in before.values() and "pending" in before.values()

    assert "to be continued" in execute(args, tmp_path).stdout
    assert set(states(folder).values()) == {"done"}
    logs = "".join((job / "job.log").read_text() for job in _jobs(folder))
    assert "Continuing" in logs and "changed settings" not in logs
    # The results equal those of an uninterrupted run without a sweep.
    name = "mtp.depth=0 seed=0"
    train_here(tmp_path / "alone", cache, {**settings, "mtp.depth": 0, "seed": 0})
    assert rows(plan(folder)[name]) == rows(tmp_path / "alone")
    # A further call has nothing to do.
    began = {job: (job / "job.log").stat().st_mtime_ns for job in _jobs(folder)}
    again = execute(args, tmp_path).stdout
    assert "4 done before" in again and "warning" not in again
    assert began == {job: (job / "job.log").stat().st_mtime_ns for job in _jobs(folder)}


def _jobs(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/status.json")]


@pytest.mark.slow
def test_a_failing_job_and_more_values(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    # A window longer than the text composes, and the run refuses it.
    done = execute(command(folder, cache, {"data.seq_len": "99999,16"}), tmp_path, code=1)
    assert states(folder) == {"data.seq_len=99999": "failed", "data.seq_len=16": "done"}
    last = done.stdout.strip().splitlines()[-1]
    log = plan(folder)["data.seq_len=99999"] / "job.log"
    assert last.startswith("failed: ") and last.endswith(f"(log: {log})")
    assert "error: the training split" in last and "error: the training split" in log.read_text()
    assert "sweep.retry_failed=true" in done.stdout.splitlines()[-2]

    old = {name: job / "summary.json" for name, job in plan(folder).items()}["data.seq_len=16"]
    stamp = old.stat().st_mtime_ns
    # The failed job is still failed.
    done = execute(command(folder, cache, {"data.seq_len": "99999,16,8"}), tmp_path, code=1)
    assert "1 done before, 1 failed before" in done.stdout
    assert states(folder) == {
        "data.seq_len=99999": "failed",
        "data.seq_len=16": "done",
        "data.seq_len=8": "done",
    }
    assert old.stat().st_mtime_ns == stamp
    assert log.read_text().count("error: the training split") == 1, (
        "not tried again without being asked"
    )


@pytest.mark.slow
def test_data_parallel_jobs_train_with_the_processes_asked_for(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = {"trainer.devices": "1,2", "trainer.strategy": "ddp"}
    execute(command(folder, cache, settings), tmp_path)
    sizes = {name: summary_of(job)["world_size"] for name, job in plan(folder).items()}
    assert sizes == {"trainer.devices=1": 1, "trainer.devices=2": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"], "no second folder"


WRONG = {
    "no such option": (
        {"mtp": "sequential,sequentail"},
        (),
        "no option 'sequentail': did you mean sequential?",
    ),
    "added key": ({"+swep": "depth"}, (), "swep is not a key: did you mean sweeps?"),
    "unknown number": ({"trainer.devices": "1,-1"}, (), "trainer.devices must be a whole number"),
    "batches": ({"seed": "0,1"}, ("hydra.sweeper.max_batch_size=1",), "max_batch_size"),
    "no values": ({"seed": "range(0)"}, (), "seed=range(0) has no values"),
    "no step": ({"seed": "range(0,2,0)"}, (), "seed=range(0,2,0) has no values"),
    "a range": (
        {"optimizer.lr": "interval(0.1,1)"},
        (),
        "has no single values: list some, as in optimizer.lr=A,B, or use python -m sweeps.search",
    ),
    "the folder of one run": ({"run_dir": "mine", "seed": "0,1"}, (), "mine is the folder of one"),
    "module": ({"seed": "0,1"}, ("hydra.launcher.module=sweeps.pol",), "sweeps.pol cannot be used"),
    "launcher": (
        {"seed": "0,1"},
        ("hydra.launcher.n_jobs=0",),
        "n_jobs must be a whole number of at least 1",
    ),
    "a word": ({"seed": "0,1"}, ("hydra.launcher.grace_seconds=abc",), "must be a number"),
    # Refused when the jobs are run, after the sweep is planned.
    "machines": (
        {"trainer.num_nodes": "1,2", "trainer.strategy": "ddp"},
        (),
        "num_nodes=2 in a sweep takes",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_before_any_job_starts(tmp_path, cache, case):
    settings, more, told = WRONG[case]
    args = command(tmp_path / "sweep", cache, settings, *more)
    assert told in execute(args, tmp_path, code=1).stderr
    # Hydra has made the folder; it stays only if the sweep was planned before it was refused.
    planned = (tmp_path / "sweep" / "sweep.json").exists()
    assert (tmp_path / "sweep").exists() == planned == (case == "machines")


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("auto", marks=pytest.mark.slow), pytest.param("ddp", marks=pytest.mark.long)],
)
def test_a_second_one_is_refused_and_ctrl_c_ends_the_first(tmp_path, cache, strategy):
    folder = tmp_path / "sweep"
    settings = {
        "seed": "0,1,2", "trainer.max_steps": 4000, "trainer.val_check_interval": 4000,
        "callbacks.checkpoints.every_n_steps": 10, "trainer.strategy": strategy,
        "trainer.devices": 2 if strategy == "ddp" else 1,
    }  # fmt: skip
    # Each process of a data-parallel job takes a place.
    places = settings["trainer.devices"] * 2
    args = command(folder, cache, settings, f"hydra.launcher.n_jobs={places}")
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 2)
    assert "Another sweep is at work" in execute(args, tmp_path, code=1).stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed and printed.strip().endswith("continues.")
    assert sorted(states(folder).values()) == ["interrupted", "interrupted", "pending"]
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder) not in left


def test_a_dry_run_checks_lists_and_leaves_nothing(tmp_path: Path) -> None:
    def dry(*more: str, code: int = 0) -> str:
        args = [sys.executable, str(ROOT / "train.py"), *more, "--dry-run"]
        done = execute(args, tmp_path, code=code)
        assert not list(tmp_path.iterdir())
        return done.stderr if code else done.stdout

    told = dry("-m", "mtp.depth=0,2", "compare.match=none,flops", "sweep_dir=sweep")
    first, *jobs = told.splitlines()
    assert first == "4 jobs in sweep pass the checks; none is started (--dry-run):"
    assert [line.split(maxsplit=1) for line in jobs] == [
        ["mtp.depth-0_compare.match-none", "3500 steps"],
        ["mtp.depth-0_compare.match-flops", "steps by compare.match"],
        ["mtp.depth-2_compare.match-none", "3500 steps"],
        ["mtp.depth-2_compare.match-flops", "steps by compare.match"],
    ]
    # A prepared sweep with fewer values.
    narrowed = dry("-m", "+sweeps=depth", "mtp.depth=0,2", "seed=0", "sweep_dir=sweep")
    assert narrowed.startswith("2 jobs ") and "mtp.depth-2" in narrowed
    # It works with any launcher, and finds a mistake in one job.
    args = ("-m", "mtp.depth=0,2", "sweep_dir=sweep", "hydra/launcher=plan")
    assert "none is started" in dry(*args)
    wrong = dry("-m", "mtp.depth=0,300", "sweep_dir=sweep", code=1)
    assert "mtp.depth=300 is larger than the window" in wrong
    assert "--dry-run lists the jobs of a sweep: add -m" in dry("mtp.depth=0", code=1)
