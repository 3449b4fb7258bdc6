"""Sweeps by Ray, which each test's sweep starts on this machine and stops again."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.integration.helpers import ROOT, overrides, start
from tests.sweeps.typed import execute, plan, states, wait_until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: bash tests/install_ray.sh",
    ),
]


def command(folder: Path, cache: Path, settings: dict[str, Any], *more: str) -> list[str]:
    given = overrides(cache, settings)
    train = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/launcher=ray"]
    return [*train, f"sweep_dir={folder}", *more, *given]


def test_jobs_fail_alone_and_train_with_the_processes_asked_for(tmp_path, cache):
    folder = tmp_path / "sweep"
    settings = {"trainer.devices": "1,2", "trainer.strategy": "ddp", "seed": "-1,0"}
    execute(command(folder, cache, settings), tmp_path, code=1)
    assert sorted(states(folder).values()) == ["done", "done", "failed", "failed"]
    for name, job in plan(folder).items():
        status = json.loads((job / "status.json").read_text())
        assert status["device"].startswith("ray:")
        if "seed=0" in name:
            size = json.loads((job / "summary.json").read_text())["world_size"]
            assert f"trainer.devices={size}" in name


def test_interrupted_and_continued(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "sweep"
    settings = {"seed": "0,1,2", "trainer.max_steps": 300}
    args = command(folder, cache, settings)
    process = start(args, tmp_path / "log", cwd=tmp_path)
    wait_until(lambda: list(folder.glob("*/metrics.csv")))
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130, (tmp_path / "log").read_text()
    assert set(states(folder).values()) == {"interrupted"}
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(folder) not in left
    execute(args, tmp_path)
    assert set(states(folder).values()) == {"done"}
    assert "Continuing" in "".join((job / "job.log").read_text() for job in plan(folder).values())


def test_more_than_there_is_is_refused(tmp_path: Path, cache: Path) -> None:
    args = command(tmp_path / "sweep", cache, {}, "hydra.launcher.cpus_per_process=999")
    assert "999 cores" in execute(args, tmp_path, code=1).stderr
