"""Runs that several tests look at."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache of token stores for all runs of this worker."""
    return tmp_path_factory.mktemp("cache")
