"""The cache of token stores that integration tests share, and refusals by the commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import cache, once

__all__ = ["cache", "once", "refused"]

Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """``refused(main, word, ..)``: the one line with which a command refuses its words."""

    def get(main: Callable[[list[str]], None], *words: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        return said

    return get
