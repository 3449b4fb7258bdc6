"""How many threads a process has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.integration.helpers import ROOT

SHOW = """
import sys, torch
from mtp_lightning import runtime
runtime._CORES = int(sys.argv[1])
runtime.set_threads(int(sys.argv[2]) or None, processes=int(sys.argv[3]))
print(torch.get_num_threads())
"""


def threads(cores: int, asked: int, processes: int = 1, **environment: str) -> str:
    given = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, "-c", SHOW, str(cores), str(asked), str(processes)]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    return done.stdout.strip() or done.stderr


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (8, 2, 3), (2, 2, 1)]
)
def test_a_core_is_left_free(cores: int, processes: int, expected: int) -> None:
    assert threads(cores, 0, processes) == str(expected)


def test_what_is_asked_for_counts() -> None:
    assert threads(8, 2) == "2"
    assert threads(8, 0, OMP_NUM_THREADS="1") == "1"
    assert (
        "num_threads must be a whole number of at least 1, or null for all cores but one, not -1"
        in threads(2, -1)
    )
