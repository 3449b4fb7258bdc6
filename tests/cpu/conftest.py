"""Shared by the tests of fast code for CPUs."""

from __future__ import annotations

import ctypes

import pytest

from tests.kernels import use_library


@pytest.fixture
def own(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes by the library of this checkout."""
    use_library(monkeypatch, library)
