"""benchmarks/serve.py asks two real servers, and its numbers can be true."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import serve
from tests.integration.helpers import train_here

pytestmark = pytest.mark.extras


def test_rows(tmp_path: Path) -> None:
    train_here(tmp_path / "mine", tmp_path / "cache", {"data.seq_len": 64})
    run = str(tmp_path / "mine")
    found = serve.measure(run, clients=[1, 2], turns=1, tokens=3, cpu_time=False)
    assert found["same_texts"] is True
    assert [(row["way"], row["clients"]) for row in found["rows"]] == [
        *(("speculative", 1), ("plain", 1), ("speculative", 2), ("plain", 2))
    ]
    for row in found["rows"]:
        assert 0 < row["requests_per_second"] <= row["tokens_per_second"]
        assert row["way"] != "plain" or row["speedup"] == 1
        assert row["clients"] != 1 or row["against_one"] == 1
