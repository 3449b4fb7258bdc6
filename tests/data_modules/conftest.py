"""Fixtures for files: which of them are read, and how old they look."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_modules import digests


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Names of the files whose content was read, in order."""
    seen: list[str] = []
    real = digests.hashlib.file_digest
    monkeypatch.setattr(
        digests.hashlib,
        "file_digest",
        lambda file, how: seen.append(Path(file.name).name) or real(file, how),
    )
    return seen


@pytest.fixture
def later(monkeypatch) -> None:
    """Makes every file look as if it had been written long ago."""
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10_000_000_000)
