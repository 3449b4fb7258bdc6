"""Shared by all tests: one thread a worker, so that workers do not fight over the cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from mtp_lightning.mtp.sequential import SequentialConfig  # noqa: E402
from mtp_lightning.nn.config import TrunkConfig  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def tiny_trunk() -> TrunkConfig:
    """A trunk that builds and runs in milliseconds, with grouped key-value heads."""
    return TrunkConfig(vocab_size=37, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48)


@pytest.fixture
def sequential() -> SequentialConfig:
    return SequentialConfig(depth=2)
