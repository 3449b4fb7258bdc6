"""Sweeps start runs as the integration tests do; and reports draw no more than a test looks at."""

from __future__ import annotations

from typing import Any

import pytest

from tests.integration.conftest import cache, once

__all__ = ["cache", "once"]

_FIGURES: dict[str, bytes] = {}


@pytest.fixture
def drawn() -> None:
    """Asked for by a test of a report that looks into its figures."""


@pytest.fixture(autouse=True)
def undrawn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of a report is the same one: to draw them is most of a report's time."""
    name = request.module.__name__.split(".")[-1]
    looks = "drawn" in request.fixturenames or name == "test_report_browser"
    if looks or not name.startswith(("test_report", "test_equivalent")):
        return
    chart = pytest.importorskip("sweeps.report.chart")
    save = chart.Chart._save

    def save_once(self: Any, *, format: str, **options: Any) -> bytes:
        if format not in _FIGURES:
            _FIGURES[format] = save(self, format=format, **options)
        return _FIGURES[format]

    monkeypatch.setattr(chart.Chart, "_save", save_once)
