"""The cache of token stores that integration tests share."""

from tests.integration.conftest import cache, once

__all__ = ["cache", "once"]
