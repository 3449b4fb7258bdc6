"""benchmarks/moe.py runs from its command line, and its numbers can be true."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import moe


def test_moe(tmp_path: Path) -> None:
    output = tmp_path / "moe.json"
    result = moe.main(["--quick", "--sizes", "nano", "--output", str(output)])
    assert json.loads(output.read_text(encoding="utf-8")) == result
    (row,) = result["rows"]
    assert row["dense_d_ff"] == 3 * 64
    assert row["ratio"] == pytest.approx(row["moe_us_per_token"] / row["dense_us_per_token"])
    # A dense mask over all 16 experts would do 17 / 3 of the work; a busy machine is no ground.
    assert row["ratio"] > 0.5
