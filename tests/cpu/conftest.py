"""Shared by the tests of fast code for CPUs."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mtp_lightning.experiment import generating
from mtp_lightning.model import MTPModel
from tests.decoding.models import small_model
from tests.integration.conftest import cache, finished, once  # noqa: F401
from tests.kernels import CAPABILITY, use_library
from tests.models import as_stored

# A CPU with AVX-512 also runs the code for AVX2.
OTHERS = [pytest.param("AVX2", marks=pytest.mark.slow)] if CAPABILITY == "AVX512" else []


@pytest.fixture(params=[CAPABILITY, *OTHERS])
def built_library(
    libraries: Callable[[str], ctypes.CDLL],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lets a test use the library that is built from this checkout."""
    use_library(monkeypatch, libraries(request.param))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[..., MTPModel]:
    """``opened(setting=..)``: a small model as ``generate.py`` opens it with these settings."""
    defaults = {"precision": "fp32", "head_precision": None, "activations": "fp32"}
    defaults |= {"compile": False, "num_threads": 1, "accelerator": "cpu", "checkpoint": "x"}

    def open_model(*args: Any, packer_for: Any = None, **options: Any) -> Any:
        model = small_model(2, 1)
        if packer_for is not None:
            model = as_stored(model).build(functools.partial(packer_for, path=None))
        return SimpleNamespace(model=model)

    def opened(**settings: Any) -> MTPModel:
        cfg = SimpleNamespace(**{**defaults, "allow": [], **settings})
        return generating.open_from_config(cfg).model

    monkeypatch.setattr(generating, "open_model", open_model)
    return opened
