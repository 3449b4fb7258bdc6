"""Sweeps as they are typed, and what their folders hold."""

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


def command(folder: Path, cache: Path, settings: dict[str, Any], *more: str) -> list[str]:
    own = [f"sweep_dir={quoted(str(folder))}", "hydra.launcher.n_jobs=2", *more]
    return [sys.executable, str(ROOT / "train.py"), "-m", *overrides(cache, settings), *own]


def execute(args: list[str], cwd: Path, *, code: int = 0, **more: str) -> Done:
    return helpers.execute(args, cwd, code=code, imported=LIGHT, **more)


def plan(folder: Path) -> dict[str, Path]:
    """The jobs' folders by their varied overrides."""
    stored = json.loads((folder / "sweep.json").read_text())
    return {
        " ".join(o for o in job["overrides"] if o.split("=")[0] in stored["varied"]): folder
        / job["folder"]
        for job in stored["jobs"]
    }


def states(folder: Path) -> dict[str, str]:
    found = {}
    for name, job in plan(folder).items():
        file = job / "status.json"
        found[name] = json.loads(file.read_text())["state"] if file.exists() else "none"
    return found


def wait_until(what: Any, seconds: float = 480.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "did not happen"
        time.sleep(0.01)
