"""Runs that several tests read, made once for all of pytest's workers."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.helpers import train_here

Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once(name, make)``: a folder that ``make`` fills in the first worker that needs it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder, made = base / f"shared-{name}", base / f"shared-{name}.made"
        with (base / f"shared-{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
            if not made.exists():
                folder.mkdir()
                make(folder)
                made.touch()
        return folder

    return get


@pytest.fixture(scope="session")
def finished(once: Once, cache: Path) -> Path:
    """The quick run, finished; not to be changed."""
    return once("finished", lambda folder: train_here(folder, cache))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """``tmp_path``, with a copy of the finished run that the test may change."""
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@pytest.fixture(scope="session")
def cache(once: Once) -> Path:
    """One cache of token stores for all runs."""
    return once("cache", lambda folder: None)
