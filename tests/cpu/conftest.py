"""Shared by the tests of fast code for CPUs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest

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
