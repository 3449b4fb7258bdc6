"""Programs of Python that tests start, signal and wait for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import data_modules


def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    """A program with these arguments, whose output is read."""
    root = str(Path(data_modules.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        **options,
    )
