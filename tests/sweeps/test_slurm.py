"""Sweeps in a real Slurm queue on this machine, set up by tests/install_slurm.sh."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mtp_lightning.run.status import read_status
from tests.integration.helpers import start, summary_of
from tests.sweeps import typed
from tests.sweeps.typed import execute, job_folders, job_states, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.slurm]


@pytest.fixture(autouse=True)
def cluster() -> None:
    pytest.importorskip("submitit", reason="needs the extra slurm")
    if shutil.which("sinfo") is None:
        pytest.skip("Slurm is not installed: bash tests/install_slurm.sh")
    nodes = subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True)
    if nodes.returncode != 0 or not nodes.stdout.strip():
        pytest.skip("Slurm does not run: bash tests/install_slurm.sh")


def command(folder: Path, cache: Path, settings: dict[str, Any], *more: str) -> list[str]:
    one_core = "hydra.launcher.cpus_per_process=1"
    return typed.command(folder, cache, settings, one_core, *more, launcher="slurm")


def test_jobs_fail_alone_and_use_the_configured_processes(tmp_path, cache):
    folder = tmp_path / "sweep"
    settings = {"trainer.devices": "1,2", "trainer.strategy": "ddp", "seed": "-1,0"}
    done = execute(command(folder, cache, settings), tmp_path, code=1)
    assert sorted(job_states(folder).values()) == ["done", "done", "failed", "failed"]
    assert done.stdout.count("\nfailed: ") == 2
    for name, job in job_folders(folder).items():
        status = read_status(job)
        assert re.fullmatch(r"slurm:\d+(_\d+)?", status["device"])
        if "seed=0" in name:
            assert f"trainer.devices={summary_of(job)['world_size']}" in name
        else:
            assert "error: seed" in status["reason"]
    again = execute(command(folder, cache, settings), tmp_path, code=1)
    assert "2 done before, 2 failed before" in again.stdout


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_requeued_jobs_continue(tmp_path: Path, cache: Path, strategy: str) -> None:
    """Slurm sends SIGUSR2 before it ends a job, which then waits in the queue for minutes."""
    folder = tmp_path / f"sweep_{os.getpid()}"
    settings = {
        "trainer.max_steps": 400,
        "trainer.val_check_interval": 200,
        "callbacks.checkpoints.every_n_steps": 20,
        "trainer.strategy": strategy,
        "trainer.devices": 1 if strategy == "auto" else 2,
    }
    args = command(folder, cache, settings)
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: list(folder.glob("*/checkpoints/last.ckpt")))
    (job,) = job_folders(folder).values()
    number = read_status(job)["device"].removeprefix("slurm:")
    subprocess.run(["scancel", "--signal=USR2", number], check=True)
    wait_until(lambda: job_states(folder)[""] == "interrupted")
    wait_until(lambda: "PENDING" in _queue(number))
    subprocess.run(["scontrol", "update", f"jobid={number}", "starttime=now"], check=True)
    assert process.wait(200) == 0, (tmp_path / "log").read_text()
    assert job_states(folder) == {"": "done"}
    text = (job / "job.log").read_text()
    (step,) = {int(step) for step in re.findall(r"Continuing .* from step (\d+)", text)}
    assert 0 < step < 400
    if strategy == "auto":
        assert f"interrupted; step {step} is saved" in text


def _queue(number: str) -> str:
    command = ["squeue", "-h", "-r", "-j", number, "-o", "%T"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_ctrl_c_empties_the_queue(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = {"seed": "0,1,2,3", "trainer.max_steps": 3000}
    args = command(folder, cache, settings, "hydra.launcher.n_jobs=2")
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: len(list(folder.glob("*/metrics.csv"))) == 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert set(job_states(folder).values()) == {"interrupted"}
    queue = ["squeue", "-h", "-t", "pending,running", "-n", "sweep"]
    assert subprocess.run(queue, capture_output=True, text=True).stdout == ""


def test_a_refusal_by_slurm_is_reported(tmp_path: Path, cache: Path) -> None:
    args = command(tmp_path / "sweep", cache, {}, "hydra.launcher.partition=nosuch")
    error = execute(args, tmp_path, code=1).stderr
    assert "error: Slurm refuses the job" in error and "artition" in error
