"""Some cases of each kind, the same in every run."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, environment


def test_the_harness_starts() -> None:
    """Its cases run rarely, so a name that is gone would be noticed late."""
    importlib.import_module("tests.chaos.__main__")


@pytest.mark.long
def test_twelve_repeatable_cases_hold(tmp_path: Path) -> None:
    arguments = ["--alone", "--repeatable", "--cases", "12", "--folder", tmp_path]
    options = {"capture_output": True, "text": True, "timeout": 900, "cwd": ROOT}
    command = [sys.executable, "-m", "tests.chaos", *arguments]
    done = subprocess.run(command, env=environment(), **options)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
