"""A slice of the harness: the same cases every time, some of each kind."""

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
def test_what_is_promised_holds(tmp_path: Path) -> None:
    given = ["--alone", "--repeatable", "--cases", "12", "--folder", tmp_path]
    how = {"capture_output": True, "text": True, "timeout": 900, "cwd": ROOT}
    command = [sys.executable, "-m", "tests.chaos", *given]
    done = subprocess.run(command, env=environment(), **how)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
