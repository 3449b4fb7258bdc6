"""Shared by the tests of fast code for CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_lightning.experiment import generating
from mtp_lightning.model import MTPModel
from tests.decoding.models import small_model
from tests.kernels import CAPABILITY, use_library

# A CPU with AVX-512 computes by the code for AVX2, too.
OTHERS = [pytest.param("AVX2", marks=pytest.mark.slow)] if CAPABILITY == "AVX512" else []


@pytest.fixture(params=[CAPABILITY, *OTHERS])
def own(
    libraries: Callable[[str], ctypes.CDLL],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Computes by the libraries of this checkout."""
    use_library(monkeypatch, libraries(request.param))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MTPModel]:
    """A small model as ``generate.py`` opens it with some settings."""
    plain = {"precision": "fp32", "head_precision": None, "activations": "fp32", "compile": False}
    plain |= {"num_threads": 1, "accelerator": "cpu", "checkpoint": "x", "allow": []}

    def found(*args: Any, **options: Any) -> Any:
        return SimpleNamespace(model=small_model(2, 1))

    monkeypatch.setattr(generating, "open_model", found)
    return lambda **asked: generating.open_from_config(SimpleNamespace(**{**plain, **asked})).model
