"""Command lines of sweeps, and the jobs and states in their folders."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mtp_lightning.command_line.quote import quoted
from tests.integration import helpers
from tests.integration.helpers import ROOT, overrides
from tests.warm import LIGHT, Done


def command(
    folder: Path, cache: Path, settings: dict[str, Any], *more: str, launcher: str = ""
) -> list[str]:
    """The command line of a sweep of quick runs, two at a time or by the launcher."""
    by = f"hydra/launcher={launcher}" if launcher else "hydra.launcher.n_jobs=2"
    options = [f"sweep_dir={quoted(str(folder))}", by, *more]
    return [sys.executable, str(ROOT / "train.py"), "-m", *overrides(cache, settings), *options]


def execute(args: list[str], cwd: Path, *, code: int = 0, **more: str) -> Done:
    return helpers.execute(args, cwd, code=code, imported=LIGHT, **more)


def job_folders(folder: Path) -> dict[str, Path]:
    """The folders of a sweep's jobs by their varied overrides."""
    stored = json.loads((folder / "sweep.json").read_text())
    return {
        " ".join(o for o in job["overrides"] if o.split("=")[0] in stored["varied"]): folder
        / job["folder"]
        for job in stored["jobs"]
    }


def job_states(folder: Path) -> dict[str, str]:
    """The states of a sweep's jobs by their varied overrides; "none" without a status."""
    states_by_job = {}
    for name, job in job_folders(folder).items():
        file = job / "status.json"
        states_by_job[name] = json.loads(file.read_text())["state"] if file.exists() else "none"
    return states_by_job


def wait_until(condition: Any, seconds: float = 480.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.01)
