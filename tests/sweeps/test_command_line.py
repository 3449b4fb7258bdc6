"""Sweeps of real runs, by the command line."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, rows, start, summary_of, train_here
from tests.sweeps.typed import command, execute, job_folders, job_states, wait_until


@pytest.mark.slow
def test_a_killed_sweep_resumes_and_repeats_no_finished_job(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "it's a sweep"
    settings = {
        "mtp.depth": "0,1", "seed": "0,1", "trainer.max_steps": 120,
        "trainer.val_check_interval": 120, "callbacks.checkpoints.every_n_steps": 10,
    }  # fmt: skip
    args = command(folder, cache, settings)
    process = start(args, tmp_path / "log", cwd=tmp_path)

    def has_checkpoint() -> bool:
        assert process.poll() is None, (tmp_path / "log").read_text()
        return any(job.joinpath("checkpoints/last.ckpt").exists() for job in _jobs(folder))

    try:
        wait_until(has_checkpoint)
    finally:
        process.kill()
        process.wait()
    before = job_states(folder)
    assert len(before) == 4 and "done" not in before.values()
    assert "running" in before.values() and "pending" in before.values()

    assert "to be continued" in execute(args, tmp_path).stdout
    assert set(job_states(folder).values()) == {"done"}
    logs = "".join((job / "job.log").read_text() for job in _jobs(folder))
    assert "Continuing" in logs and "changed settings" not in logs
    # Results equal those of an uninterrupted run without a sweep.
    name = "mtp.depth=0 seed=0"
    train_here(tmp_path / "alone", cache, {**settings, "mtp.depth": 0, "seed": 0})
    assert rows(job_folders(folder)[name]) == rows(tmp_path / "alone")
    # A further call has nothing to do.
    began = {job: (job / "job.log").stat().st_mtime_ns for job in _jobs(folder)}
    again = execute(args, tmp_path).stdout
    assert "4 done before" in again and "warning" not in again
    assert began == {job: (job / "job.log").stat().st_mtime_ns for job in _jobs(folder)}


def _jobs(folder: Path) -> list[Path]:
    return [path.parent for path in folder.glob("*/status.json")]


@pytest.mark.slow
def test_a_failed_job_stays_failed_when_values_are_added(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    # A window longer than the text composes, and the run refuses it.
    done = execute(command(folder, cache, {"data.seq_len": "99999,16"}), tmp_path, code=1)
    assert job_states(folder) == {"data.seq_len=99999": "failed", "data.seq_len=16": "done"}
    last = done.stdout.strip().splitlines()[-1]
    log = job_folders(folder)["data.seq_len=99999"] / "job.log"
    assert last.startswith("failed: ") and last.endswith(f"(log: {log})")
    assert "error: the training split" in last and "error: the training split" in log.read_text()
    assert "sweep.retry_failed=true" in done.stdout.splitlines()[-2]

    summary = job_folders(folder)["data.seq_len=16"] / "summary.json"
    stamp = summary.stat().st_mtime_ns
    done = execute(command(folder, cache, {"data.seq_len": "99999,16,8"}), tmp_path, code=1)
    assert "1 done before, 1 failed before" in done.stdout
    assert job_states(folder) == {
        "data.seq_len=99999": "failed",
        "data.seq_len=16": "done",
        "data.seq_len=8": "done",
    }
    assert summary.stat().st_mtime_ns == stamp
    assert log.read_text().count("error: the training split") == 1, "the failed job ran again"


@pytest.mark.slow
def test_data_parallel_jobs_use_the_configured_processes(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = {"trainer.devices": "1,2", "trainer.strategy": "ddp"}
    execute(command(folder, cache, settings), tmp_path)
    sizes = {name: summary_of(job)["world_size"] for name, job in job_folders(folder).items()}
    assert sizes == {"trainer.devices=1": 1, "trainer.devices=2": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"], "no second folder"


# Overrides, and words of the message.
WRONG = {
    "unknown option": ("balance=none,dwaa", "no option 'dwaa': did you mean dwa?"),
    "unknown key": ("+sweps=depth", "sweps is not a key: did you mean sweeps?"),
    "devices": ("trainer.devices=1,-1", "trainer.devices must be a whole number"),
    "batches": ("seed=0,1 hydra.sweeper.max_batch_size=1", "max_batch_size"),
    "interval": ("optimizer.lr=interval(0.1,1)", "has no single values: list some, as in opt"),
    "run_dir": ("seed=0,1 run_dir=mine", "run_dir=mine is the folder of one run"),
    "module": ("seed=0,1 hydra.launcher.module=sweeps.pol", "sweeps.pol cannot be used"),
    "n_jobs": ("seed=0,1 hydra.launcher.n_jobs=0", "n_jobs must be a whole number in [1, 1024]"),
    "grace": ("seed=0,1 hydra.launcher.grace_seconds=abc", "must be a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_invalid_sweeps_are_refused_before_any_job_starts(tmp_path, cache, case):
    wrong, message = WRONG[case]
    args = command(tmp_path / "sweep", cache, {}, *wrong.split())
    assert message in execute(args, tmp_path, code=1).stderr
    assert not (tmp_path / "sweep").exists(), "Hydra makes the folder"


@pytest.mark.parametrize(
    "strategy",
    [pytest.param("auto", marks=pytest.mark.slow), pytest.param("ddp", marks=pytest.mark.long)],
)
def test_a_second_sweep_is_refused_and_ctrl_c_ends_the_first(tmp_path, cache, strategy):
    folder = tmp_path / "sweep"
    settings = {
        "seed": "0,1,2", "trainer.max_steps": 4000, "trainer.val_check_interval": 4000,
        "callbacks.checkpoints.every_n_steps": 10, "trainer.strategy": strategy,
        "trainer.devices": 2 if strategy == "ddp" else 1,
    }  # fmt: skip
    # Each process of a data-parallel job takes one of n_jobs places.
    places = settings["trainer.devices"] * 2
    args = command(folder, cache, settings, f"hydra.launcher.n_jobs={places}")
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: len(list(folder.glob("*/checkpoints/last.ckpt"))) == 2)
    assert "Another sweep is at work" in execute(args, tmp_path, code=1).stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(240) == 130
    printed = (tmp_path / "log").read_text()
    assert "Traceback" not in printed and printed.strip().endswith("continues.")
    assert sorted(job_states(folder).values()) == ["interrupted", "interrupted", "pending"]
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder) not in processes


def test_a_dry_run_checks_and_lists_jobs_and_writes_nothing(tmp_path: Path) -> None:
    def dry(*more: str, code: int = 0) -> str:
        args = [sys.executable, str(ROOT / "train.py"), *more, "--dry-run"]
        done = execute(args, tmp_path, code=code)
        assert not list(tmp_path.iterdir())
        return done.stderr if code else done.stdout

    listing = dry("-m", "mtp.depth=0,2", "compare.match=none,flops", "sweep_dir=sweep")
    first, *jobs = listing.splitlines()
    assert first == "4 jobs in sweep: the checks pass, and nothing is started (--dry-run):"
    assert [line.split(maxsplit=1) for line in jobs] == [
        ["mtp.depth-0_compare.match-none", "3,500 steps"],
        ["mtp.depth-0_compare.match-flops", "steps by compare.match"],
        ["mtp.depth-2_compare.match-none", "3,500 steps"],
        ["mtp.depth-2_compare.match-flops", "steps by compare.match"],
    ]
    # A prepared sweep with fewer values, and another launcher.
    narrowed = ("+sweeps=depth", "mtp.depth=0,2", "seed=0", "hydra/launcher=plan")
    listing = dry("-m", *narrowed, "sweep_dir=sweep")
    assert listing.startswith("2 jobs ") and "nothing is started" in listing
    assert "mtp.depth-2" in listing
    # A mistake in one of the jobs.
    error = dry("-m", "mtp.depth=0,300", "sweep_dir=sweep", code=1)
    assert "mtp.depth=300 is larger than the window" in error
    assert "--dry-run lists the jobs of a sweep: add -m" in dry("mtp.depth=0", code=1)


def test_a_dry_run_or_a_mistake_leaves_a_begun_sweep_as_it_is(tmp_path: Path) -> None:
    def sweep(depths: str, *more: str, code: int = 0) -> str:
        options = ["hydra/launcher=plan", "sweep_dir=sweep", *more]
        args = [sys.executable, str(ROOT / "train.py"), "-m", f"mtp.depth={depths}", *options]
        return execute(args, tmp_path, code=code).stdout

    sweep("0,1")
    files = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert tmp_path / "sweep" / "multirun.yaml" in files
    before = [path.read_bytes() for path in files]
    assert sweep("0,1,2", "--dry-run").startswith("3 jobs ")
    sweep("0,300", code=1)
    assert files == [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert before == [path.read_bytes() for path in files]
