"""Sweeps by Ray; each test's sweep starts Ray on this machine and stops it."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest

from mtp_lightning.run.status import read_status
from tests.integration.helpers import start, summary_of
from tests.sweeps import typed
from tests.sweeps.typed import execute, job_folders, job_states, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: bash tests/install_ray.sh",
    ),
]


command = partial(typed.command, launcher="ray")


def test_jobs_fail_alone_and_use_the_configured_processes(tmp_path, cache):
    folder = tmp_path / "sweep"
    settings = {"trainer.devices": "1,2", "trainer.strategy": "ddp", "seed": "-1,0"}
    execute(command(folder, cache, settings), tmp_path, code=1)
    assert sorted(job_states(folder).values()) == ["done", "done", "failed", "failed"]
    for name, job in job_folders(folder).items():
        assert read_status(job)["device"].startswith("ray:")
        if "seed=0" in name:
            assert f"trainer.devices={summary_of(job)['world_size']}" in name


def test_an_interrupted_sweep_continues(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = {"seed": "0,1,2", "trainer.max_steps": 300}
    args = command(folder, cache, settings)
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: list(folder.glob("*/metrics.csv")))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert set(job_states(folder).values()) == {"interrupted"}
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder) not in processes
    execute(args, tmp_path)
    assert set(job_states(folder).values()) == {"done"}
    assert any("Continuing" in log.read_text() for log in folder.glob("*/job.log"))


def test_more_cores_than_the_machine_has_are_refused(tmp_path: Path, cache: Path) -> None:
    args = command(tmp_path / "sweep", cache, {}, "hydra.launcher.cpus_per_process=999")
    assert "999 cores" in execute(args, tmp_path, code=1).stderr
