"""Fixtures: the cache of the integration tests, and reports that draw only the needed figures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from typing import Any

import pytest

from tests.integration.conftest import cache, once

__all__ = ["cache", "once"]

if not all(map(find_spec, ("jinja2", "matplotlib", "scipy"))):  # the extra report
    collect_ignore_glob = ["claims/*", "test_report*", "test_equivalent.py"]

# Drawing takes most of a report's time. All figures of a format in _ONCE are copies of the first.
_SAVED: dict[str, bytes] = {}
_ONCE = {"png"}


@pytest.fixture(scope="session", autouse=True)
def saved_once() -> Iterator[None]:
    from sweeps.report.chart import Chart

    save = Chart._save

    def save_once(self: Any, *, format: str, **options: Any) -> bytes:
        if format not in _ONCE:
            return save(self, format=format, **options)
        if format not in _SAVED:
            _SAVED[format] = save(self, format=format, **options)
        return _SAVED[format]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Chart, "_save", save_once)
        yield


@pytest.fixture
def real_figures() -> None:
    """Requested by a test that needs a report's real figures."""


@pytest.fixture(autouse=True)
def one_figure_for_all(request: pytest.FixtureRequest) -> Iterator[None]:
    """Use one SVG for all figures of a test's reports; module fixtures still draw theirs."""
    name = request.module.__name__.split(".")[-1]
    needs_figures = "real_figures" in request.fixturenames or name == "test_report_browser"
    of_report = name.startswith(("test_report", "test_equivalent"))
    with svg_once() if of_report and not needs_figures else nullcontext():
        yield


@contextmanager
def svg_once() -> Iterator[None]:
    _ONCE.add("svg")
    yield
    _ONCE.discard("svg")
