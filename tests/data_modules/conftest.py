"""Fixtures that record which files are read, and that make files look old."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_modules import digests


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """Names of the files whose content was read, in order."""
    names: list[str] = []
    file_digest = digests.hashlib.file_digest
    monkeypatch.setattr(
        digests.hashlib,
        "file_digest",
        lambda file, name: names.append(Path(file.name).name) or file_digest(file, name),
    )
    return names


@pytest.fixture
def files_look_old(monkeypatch) -> None:
    """Makes every file look as if it had been written long ago."""
    now = time.time_ns
    monkeypatch.setattr(digests.time, "time_ns", lambda: now() + 10_000_000_000)
