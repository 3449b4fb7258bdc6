"""Random numbers of a test do not depend on the tests before it."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import settings


@pytest.fixture(scope="module")
def drawn() -> float:
    """A fixture that outlives a test is drawn before the test, but after the seeds."""
    return float(torch.rand(1))


@pytest.mark.parametrize("turn", range(2))
def test_every_test_starts_from_the_same_seeds(turn: int) -> None:
    first = torch.rand(1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(1), first)
    assert random.random() == random.Random(0).random()
    assert np.random.rand() == np.random.RandomState(0).rand()


def test_module_fixtures_start_from_the_seeds(drawn: float) -> None:
    assert drawn == float(torch.rand(1, generator=torch.Generator().manual_seed(0)))


def test_hypothesis_repeats_its_examples() -> None:
    assert settings.default is not None and settings().derandomize
