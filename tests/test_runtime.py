"""How many threads a process has."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mtp_lightning.errors import UserError
from mtp_lightning.runtime import set_threads
from tests.integration.helpers import ROOT

SHOW = """
import sys, torch
from mtp_lightning import runtime
for case in sys.argv[1:]:
    runtime._CORES, asked, processes = map(int, case.split(","))
    runtime.set_threads(asked or None, processes=processes)
    print(torch.get_num_threads())
"""


def threads(*cases: tuple[int, int, int], **environment: str) -> list[str]:
    """What each case of cores, threads that are asked for, and processes comes to, in turn."""
    given = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | environment
    command = [sys.executable, "-c", SHOW, *(",".join(map(str, case)) for case in cases)]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)
    return done.stdout.splitlines() or [done.stderr]


def test_a_core_is_left_free_and_what_is_asked_for_counts() -> None:
    cases = {(8, 0, 1): 7, (1, 0, 1): 1, (8, 0, 2): 3, (2, 0, 1): 1, (8, 2, 1): 2, (2, 0, 2): 1}
    assert threads(*cases) == [str(expected) for expected in cases.values()]
    assert threads((8, 0, 1), (8, 5, 1), OMP_NUM_THREADS="1") == ["1", "5"]


def test_no_thread_is_refused() -> None:
    wanted = "must be a whole number of at least 1, or null for all cores but one, not -1"
    with pytest.raises(UserError, match=f"num_threads {wanted}"):
        set_threads(-1)
