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
    command, env = [sys.executable, "-c", code, *map(str, arguments)], {"PYTHONPATH": root}
    pipes = {"stdout": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen(command, env=os.environ | env, **pipes)
