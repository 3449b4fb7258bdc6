"""Shared by all tests: one thread per worker, so that workers do not fight, seeds, and a check that
tests leave nothing."""

from __future__ import annotations

import os
import random
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from mtp_lightning.mtp.sequential import SequentialConfig  # noqa: E402
from mtp_lightning.nn.config import TrunkConfig  # noqa: E402
from tests.kernels import kernels, libraries, library  # noqa: E402, F401
from tests.leftovers import Leftovers  # noqa: E402

torch.set_num_threads(1)
# The same examples in every run, however slow the machine is; a search for new ones:
# HYPOTHESIS_PROFILE=default.
settings.register_profile("seeded", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "seeded"))


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Leftovers(Path(__file__).parents[1]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the wheel come first. A worker without tests takes the last ones of another, and
    would build the wheel again, which takes two minutes."""
    items.sort(key=lambda item: item.path.name != "test_wheel.py")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers, alone and after others; so do its fixtures, of whatever
    scope, since this comes before they are made."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def tiny_trunk() -> TrunkConfig:
    """A trunk that builds and runs in milliseconds, with grouped key-value heads."""
    return TrunkConfig(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


@pytest.fixture
def sequential() -> SequentialConfig:
    return SequentialConfig(depth=2)
