"""A slice of the harness: the same cases every time, some of each kind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.helpers import ROOT, environment


@pytest.mark.long
def test_what_is_promised_holds(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tests.chaos", "--alone", "--repeatable"),
            *("--cases", "12", "--folder", tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=ROOT,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
