"""The quick run and the cache of token stores that integration tests share."""

from tests.integration.conftest import cache, finished, once

__all__ = ["cache", "finished", "once"]
