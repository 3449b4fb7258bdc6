"""The cache of token stores that integration tests share, and the refusals of commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import cache, once

__all__ = ["cache", "once", "refused"]

Refused = Callable[..., str]


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """``refused(main, word, ..)``: the one line with which a command refuses its arguments."""
    monkeypatch.chdir(tmp_path)  # a refused command makes its output folder, and removes it

    def error_of(main: Callable[[list[str]], None], *words: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
        return error

    return error_of
