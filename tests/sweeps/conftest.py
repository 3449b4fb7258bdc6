"""Sweeps start runs as the integration tests do."""

from tests.integration.conftest import cache, once

__all__ = ["cache", "once"]
